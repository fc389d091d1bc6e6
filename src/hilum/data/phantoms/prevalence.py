"""The numbers of the phantom cohort: frequencies, views, co-occurrence.

They are fixed before any model is compared on phantoms, and nothing is tuned to make a model look better.
"""

# CXR-LT 2024 train_labeled.csv: positives among 258,871 images (released class counts).
TRAIN_IMAGES = 258_871
TRAIN_POSITIVES: dict[str, int] = {
    "Support Devices": 86079, "Lung Opacity": 77482, "Cardiomegaly": 74738, "Pleural Effusion": 66401,
    "Atelectasis": 65376, "Pneumonia": 46660, "Edema": 37256, "Normal": 34292, "Enlarged Cardiomediastinum": 29628,
    "Consolidation": 15371, "Pneumothorax": 13858, "Fracture": 11568, "Infiltration": 10087, "Rib Fracture": 8919,
    "Nodule": 7531, "Mass": 5288, "Calcification of the Aorta": 4239, "Hernia": 3986, "Emphysema": 3661,
    "Adenopathy": 3409, "Tortuous Aorta": 3336, "Pleural Thickening": 3272, "Granuloma": 2965, "Fissure": 2803,
    "Lung Lesion": 2338, "Tuberculosis": 2078, "Subcutaneous Emphysema": 2046, "Pulmonary Embolism": 1631,
    "Fibrosis": 1169, "Pulmonary Hypertension": 903, "Kyphosis": 778, "Infarction": 727, "Pneumomediastinum": 704,
    "Hydropneumothorax": 646, "Pleural Other": 616, "Pneumoperitoneum": 516, "Azygos Lobe": 199,
    "Round(ed) Atelectasis": 172, "Clavicle Fracture": 168, "Lobar Atelectasis": 129,
}  # fmt: skip
# The five findings of task 3, which a cohort has where it is asked for. Their counts are not among the released ones:
# these shares of studies are ours, large enough for a hundred patients of 2,000 to have each.
MORE_SHARES: dict[str, float] = {
    "Bulla": 0.03, "Cardiomyopathy": 0.03, "Hilum": 0.05, "Osteopenia": 0.05, "Scoliosis": 0.05,
}  # fmt: skip

# Studies by number of images in the same training set (5 and more counted as 4).
IMAGES_PER_STUDY = {1: 69_478, 2: 71_298, 3: 13_529, 4: 1_518}
# The set has 3.4 studies a patient with a very long tail; phantoms keep 1 to 3, so that patients stay many.
STUDIES_PER_PATIENT = {1: 0.62, 2: 0.26, 3: 0.12}
# Views for each number of images, bedside (AP) first, as shares; together they give the published mix
# AP 100,024, PA 66,470, LATERAL 57,546, LL 24,080 of 248,120 stated views.
VIEW_SETS: dict[int, list[tuple[float, tuple[str, ...]]]] = {
    1: [(0.90, ("AP",)), (0.10, ("PA",))],
    2: [(0.15, ("AP", "AP")), (0.22, ("AP", "side")), (0.60, ("PA", "side")), (0.03, ("PA", "PA"))],
    3: [(0.20, ("AP", "AP", "side")), (0.12, ("AP", "side", "side")), (0.38, ("PA", "side", "side")),
        (0.30, ("PA", "PA", "side"))],
    4: [(0.30, ("AP", "AP", "side", "side")), (0.70, ("PA", "PA", "side", "side"))],
}  # fmt: skip
LL_SHARE = 24_080 / (57_546 + 24_080)
BLANK_VIEW = 10_734 / 258_871
BLANK_VIEW_CODE = (11_222 - 10_734) / 258_871  # code missing though the view is stated
SPLIT_SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}  # CXR-LT 2024: by patient, 70 / 10 / 20
MINIMUM_PATIENTS = 8
SEVERITY = (1.5, 1.3)  # Beta: from hardly visible to obvious
SEVERITY_DRIFT = 0.12  # deviation between studies of one patient

# Latent conditions: share of the variance that stays with the patient.
CONDITIONS: dict[str, float] = {
    "heart failure": 0.7, "intensive care": 0.25, "infection": 0.2, "trauma": 0.4, "obstructive": 0.95,
    "tumour": 0.85, "old age": 1.0, "embolism": 0.3, "old tuberculosis": 0.95, "air leak": 0.3,
}  # fmt: skip
# Loadings: sign and order of magnitude from clinical association; for each finding their squares sum to less than 1.
LOADINGS: dict[str, dict[str, float]] = {
    "Support Devices": {"intensive care": 0.75, "heart failure": 0.2},
    "Lung Opacity": {"infection": 0.5, "intensive care": 0.3},
    "Cardiomegaly": {"heart failure": 0.7, "old age": 0.15},
    "Pleural Effusion": {"heart failure": 0.45, "intensive care": 0.35, "tumour": 0.15},
    "Atelectasis": {"intensive care": 0.5},
    "Pneumonia": {"infection": 0.7, "intensive care": 0.15},
    "Edema": {"heart failure": 0.65, "intensive care": 0.3},
    "Enlarged Cardiomediastinum": {"heart failure": 0.4, "old age": 0.25, "trauma": 0.15},
    "Consolidation": {"infection": 0.6, "intensive care": 0.25},
    "Pneumothorax": {"air leak": 0.6, "trauma": 0.35},
    "Fracture": {"trauma": 0.7, "old age": 0.2},
    "Rib Fracture": {"trauma": 0.75, "old age": 0.15},
    "Clavicle Fracture": {"trauma": 0.75},
    "Infiltration": {"infection": 0.5},
    "Nodule": {"tumour": 0.55, "old tuberculosis": 0.2},
    "Mass": {"tumour": 0.65},
    "Lung Lesion": {"tumour": 0.6},
    "Adenopathy": {"tumour": 0.5},
    "Calcification of the Aorta": {"old age": 0.75},
    "Tortuous Aorta": {"old age": 0.7},
    "Hernia": {"old age": 0.45},
    "Kyphosis": {"old age": 0.55, "obstructive": 0.2},
    "Emphysema": {"obstructive": 0.75},
    "Pulmonary Hypertension": {"obstructive": 0.35, "heart failure": 0.35, "embolism": 0.2},
    "Pleural Thickening": {"old tuberculosis": 0.35, "tumour": 0.2},
    "Pleural Other": {"old tuberculosis": 0.25},
    "Granuloma": {"old tuberculosis": 0.55},
    "Tuberculosis": {"old tuberculosis": 0.5, "infection": 0.25},
    "Fissure": {"heart failure": 0.35},
    "Fibrosis": {"old age": 0.25, "obstructive": 0.15},
    "Subcutaneous Emphysema": {"air leak": 0.75, "trauma": 0.3},
    "Pneumomediastinum": {"air leak": 0.75},
    "Pneumoperitoneum": {"air leak": 0.2, "intensive care": 0.3},
    "Hydropneumothorax": {"air leak": 0.55, "intensive care": 0.2},
    "Pulmonary Embolism": {"embolism": 0.7},
    "Infarction": {"embolism": 0.65},
    "Azygos Lobe": {},
    "Round(ed) Atelectasis": {"old tuberculosis": 0.2, "heart failure": 0.15},
    "Lobar Atelectasis": {"tumour": 0.3, "intensive care": 0.25},
}
# Share of a finding's own (not condition's) variance that stays with the patient: anatomy stays, infection goes.
LASTING: dict[str, float] = {
    "Azygos Lobe": 1.0, "Kyphosis": 0.97, "Calcification of the Aorta": 0.97, "Tortuous Aorta": 0.95, "Hernia": 0.95,
    "Granuloma": 0.97, "Emphysema": 0.95, "Fibrosis": 0.95, "Pleural Thickening": 0.9, "Pleural Other": 0.95,
    "Cardiomegaly": 0.9, "Pulmonary Hypertension": 0.9, "Round(ed) Atelectasis": 0.9, "Nodule": 0.8, "Mass": 0.85,
    "Lung Lesion": 0.8, "Adenopathy": 0.8, "Fracture": 0.8, "Rib Fracture": 0.8, "Clavicle Fracture": 0.8,
    "Tuberculosis": 0.85, "Enlarged Cardiomediastinum": 0.8, "Bulla": 0.95, "Cardiomyopathy": 0.9, "Hilum": 0.8,
    "Osteopenia": 0.97, "Scoliosis": 0.97,
}  # fmt: skip
LASTING_OTHERWISE = 0.45
LASTING_NORMAL = 0.6
