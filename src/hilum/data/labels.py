"""Finding vocabularies: names, spelling and order as the releases have them.

Order is data, not convention: Task 2 has Normal before Nodule, Task 1 the reverse. Everything matches by name.
"""

# CXR-LT 2024, `train_labeled.csv`, column order (bionlplab / PhysioNet cxr-lt-iccv-workshop-cvamd 2.0.0).
CXRLT_2024_TASK1: tuple[str, ...] = (
    "Adenopathy", "Atelectasis", "Azygos Lobe", "Calcification of the Aorta", "Cardiomegaly", "Clavicle Fracture",
    "Consolidation", "Edema", "Emphysema", "Enlarged Cardiomediastinum", "Fibrosis", "Fissure", "Fracture",
    "Granuloma", "Hernia", "Hydropneumothorax", "Infarction", "Infiltration", "Kyphosis", "Lobar Atelectasis",
    "Lung Lesion", "Lung Opacity", "Mass", "Nodule", "Normal", "Pleural Effusion", "Pleural Other",
    "Pleural Thickening", "Pneumomediastinum", "Pneumonia", "Pneumoperitoneum", "Pneumothorax",
    "Pulmonary Embolism", "Pulmonary Hypertension", "Rib Fracture", "Round(ed) Atelectasis",
    "Subcutaneous Emphysema", "Support Devices", "Tortuous Aorta", "Tuberculosis",
)  # fmt: skip

CXRLT_2024_TASK2: tuple[str, ...] = (
    "Atelectasis", "Calcification of the Aorta", "Cardiomegaly", "Consolidation", "Edema", "Emphysema",
    "Enlarged Cardiomediastinum", "Fibrosis", "Fracture", "Hernia", "Infiltration", "Lung Lesion", "Lung Opacity",
    "Mass", "Normal", "Nodule", "Pleural Effusion", "Pleural Other", "Pleural Thickening", "Pneumomediastinum",
    "Pneumonia", "Pneumoperitoneum", "Pneumothorax", "Subcutaneous Emphysema", "Support Devices", "Tortuous Aorta",
)  # fmt: skip

CXRLT_2024_TASK3: tuple[str, ...] = ("Bulla", "Cardiomyopathy", "Hilum", "Osteopenia", "Scoliosis")

# 2023 has "No Finding" in the slot where 2024 has "Normal"; the two do not mean the same.
CXRLT_2023: tuple[str, ...] = tuple("No Finding" if name == "Normal" else name for name in CXRLT_2024_TASK2)

TASKS: dict[str, tuple[str, ...]] = {
    "cxrlt2023": CXRLT_2023,
    "cxrlt2024-task1": CXRLT_2024_TASK1,
    "cxrlt2024-task2": CXRLT_2024_TASK2,
    "cxrlt2024-task3": CXRLT_2024_TASK3,
}

# NIH ChestX-ray14 token -> CXR-LT name (reference: Wang et al., CVPR 2017; one identity per token).
NIH_TO_CXRLT: dict[str, str] = {
    "Atelectasis": "Atelectasis",
    "Cardiomegaly": "Cardiomegaly",
    "Effusion": "Pleural Effusion",
    "Infiltration": "Infiltration",
    "Mass": "Mass",
    "Nodule": "Nodule",
    "Pneumonia": "Pneumonia",
    "Pneumothorax": "Pneumothorax",
    "Consolidation": "Consolidation",
    "Edema": "Edema",
    "Emphysema": "Emphysema",
    "Fibrosis": "Fibrosis",
    "Pleural_Thickening": "Pleural Thickening",
    "Hernia": "Hernia",
    "No Finding": "Normal",
}
