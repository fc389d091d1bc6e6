"""Finding -> how it is drawn. One line per finding; the order is the order of drawing.

A sign may change the anatomy before projection (`shape`), paint on the projection (`paint`), and name its region
(`region`) where the painted change alone is not its extent. The finding's mask is the union of both.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hilum.data.phantoms import signs_chest as chest
from hilum.data.phantoms import signs_focal as focal
from hilum.data.phantoms import signs_lung as lung
from hilum.data.phantoms import signs_pleura as pleura
from hilum.data.phantoms.anatomy import Anatomy, Array
from hilum.data.phantoms.canvas import Canvas
from hilum.data.phantoms.signs_devices import support_devices

Shape = Callable[[Anatomy, np.random.Generator, float], None]
Paint = Callable[[Canvas, np.random.Generator, float], None]
Region = Callable[[Canvas], Array]


@dataclass(frozen=True)
class Sign:
    """How one finding is drawn."""

    paint: Paint | None = None
    shape: Shape | None = None
    region: Region | None = None


SIGNS: dict[str, Sign] = {
    "Emphysema": Sign(lung.emphysema, lung.shape_emphysema, lung.emphysema_region),
    "Bulla": Sign(focal.bulla),
    "Osteopenia": Sign(None, chest.shape_osteopenia, chest.bones_region),
    "Scoliosis": Sign(None, chest.shape_scoliosis, chest.bowed_spine_region),
    "Kyphosis": Sign(None, chest.shape_kyphosis, chest.spine_region),
    "Cardiomegaly": Sign(None, chest.shape_cardiomegaly, chest.heart_region),
    "Cardiomyopathy": Sign(None, chest.shape_cardiomyopathy, chest.heart_region),
    "Enlarged Cardiomediastinum": Sign(None, chest.shape_enlarged_cardiomediastinum, chest.mediastinum_region),
    "Tortuous Aorta": Sign(None, chest.shape_tortuous_aorta, chest.aorta_region),
    "Calcification of the Aorta": Sign(chest.calcification_of_the_aorta),
    "Pulmonary Hypertension": Sign(chest.pulmonary_hypertension, chest.shape_pulmonary_hypertension),
    "Pulmonary Embolism": Sign(chest.pulmonary_embolism),
    "Hilum": Sign(chest.enlarged_hilum),
    "Adenopathy": Sign(chest.adenopathy),
    "Hernia": Sign(chest.hernia),
    "Clavicle Fracture": Sign(None, chest.shape_clavicle_fracture, chest.clavicle_fracture_region),
    "Rib Fracture": Sign(chest.rib_fracture, chest.shape_rib_fracture, chest.rib_fracture_region),
    "Fracture": Sign(None, chest.shape_fracture, chest.fracture_region),
    "Fibrosis": Sign(lung.fibrosis, lung.shape_fibrosis),
    "Edema": Sign(lung.edema),
    "Infiltration": Sign(lung.infiltration),
    "Lung Opacity": Sign(lung.lung_opacity),
    "Pneumonia": Sign(lung.pneumonia),
    "Consolidation": Sign(lung.consolidation),
    "Atelectasis": Sign(lung.atelectasis),
    "Lobar Atelectasis": Sign(lung.lobar_atelectasis),
    "Round(ed) Atelectasis": Sign(focal.rounded_atelectasis),
    "Infarction": Sign(focal.infarction),
    "Tuberculosis": Sign(focal.tuberculosis),
    "Lung Lesion": Sign(focal.lung_lesion),
    "Mass": Sign(focal.mass),
    "Nodule": Sign(focal.nodule),
    "Granuloma": Sign(focal.granuloma),
    "Fissure": Sign(pleura.fissure),
    "Azygos Lobe": Sign(pleura.azygos_lobe),
    "Pleural Thickening": Sign(pleura.pleural_thickening),
    "Pleural Other": Sign(pleura.pleural_other),
    "Pleural Effusion": Sign(pleura.pleural_effusion),
    "Pneumothorax": Sign(pleura.pneumothorax),
    "Hydropneumothorax": Sign(pleura.hydropneumothorax),
    "Pneumomediastinum": Sign(pleura.pneumomediastinum),
    "Pneumoperitoneum": Sign(pleura.pneumoperitoneum),
    "Subcutaneous Emphysema": Sign(pleura.subcutaneous_emphysema),
    "Support Devices": Sign(support_devices),
}

CHILDREN: dict[str, tuple[str, ...]] = {
    "Fracture": ("Rib Fracture", "Clavicle Fracture"),
    "Atelectasis": ("Lobar Atelectasis", "Round(ed) Atelectasis"),
    "Pneumothorax": ("Hydropneumothorax",),
    "Pleural Effusion": ("Hydropneumothorax",),
}
"""Parent -> findings that imply it. With a child present the parent has no sign of its own: it is the child's."""
