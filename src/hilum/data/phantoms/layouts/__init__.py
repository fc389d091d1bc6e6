"""The real sources' folder layouts, ids and CSV tables, for a cohort of phantoms: one file a source.

A layout names every image of a cohort (`jobs`) and writes the tables once they are made (`tables`).
"""

from hilum.data.phantoms.layouts.brax import BRAX
from hilum.data.phantoms.layouts.chexpert import CHEXPERT, CHEXPERT_PLUS, CHEXPERT_SMALL
from hilum.data.phantoms.layouts.cxrlt import CXRLT, CXRLT_OF_2023, CXRLT_WHOLE
from hilum.data.phantoms.layouts.cxrlt2026 import CXRLT_OF_2026
from hilum.data.phantoms.layouts.films import MONTGOMERY, SHENZHEN
from hilum.data.phantoms.layouts.jobs import Layout
from hilum.data.phantoms.layouts.jsrt import JSRT
from hilum.data.phantoms.layouts.mimic import MIMIC, MIMIC_DICOM
from hilum.data.phantoms.layouts.nih import NIH
from hilum.data.phantoms.layouts.openi import OPENI
from hilum.data.phantoms.layouts.padchest import PADCHEST
from hilum.data.phantoms.layouts.rsna import RSNA
from hilum.data.phantoms.layouts.siim import SIIM
from hilum.data.phantoms.layouts.taix import TAIX
from hilum.data.phantoms.layouts.vindr import VINBIGDATA, VINDR

LAYOUTS: dict[str, Layout] = {
    "brax": BRAX,
    "chexpert": CHEXPERT,
    "chexpert-plus": CHEXPERT_PLUS,
    "chexpert-small": CHEXPERT_SMALL,
    "cxrlt": CXRLT,
    "cxrlt2023": CXRLT_OF_2023,
    "cxrlt2026": CXRLT_OF_2026,
    "cxrlt45": CXRLT_WHOLE,
    "jsrt": JSRT,
    "mimic": MIMIC,
    "mimic-dicom": MIMIC_DICOM,
    "montgomery": MONTGOMERY,
    "nih": NIH,
    "openi": OPENI,
    "padchest": PADCHEST,
    "rsna": RSNA,
    "shenzhen": SHENZHEN,
    "siim": SIIM,
    "taix": TAIX,
    "vinbigdata": VINBIGDATA,
    "vindr": VINDR,
}
