"""Open-i: one XML report for each patient's first study, and PNGs. Of its quirks: reports without an image, terms with
spaces around them, one report that nobody gave terms to, and one of a poor image.
"""

from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

from hilum.core.files import write_text
from hilum.core.seeding import derive
from hilum.data.label_maps import load_map
from hilum.data.phantoms.cohort import PatientPlan
from hilum.data.phantoms.layouts.jobs import ImageJob, Layout, MaskRow, StudyJob, image_shape, names_of

REPORTS, IMAGES = "ecgen-radiology", "NLMCXR_png"
NOT_INDEXED, POOR = 11, 13
"""Of every 20 reports, which are not indexed, and which are of a poor image."""
WITHOUT_IMAGE = 10
"""One more report, without an image, for so many."""
SAYS_NOTHING = "Thoracic Vertebrae/degenerative"
"""Where a chest has findings, and none that the source could name."""


def _jobs(cohort: list[PatientPlan], seed: int, size: int) -> list[StudyJob]:
    jobs = []
    for patient in cohort:
        study, number = patient.studies[0], patient.number + 1
        film = derive(seed, "openi", patient.number) % 3000
        images = []
        for plan in study.images:
            name = f"CXR{number}_1_IM-{film:04d}-{plan.number + 1}001"
            images.append(ImageJob(name, f"{IMAGES}/{name}.png", plan, image_shape(size, plan.aspect)))
        jobs.append(StudyJob(seed, patient, study, str(number), "0", images))
    return jobs


def _reports(folder: Path, jobs: list[StudyJob], masks: list[MaskRow]) -> None:
    table = load_map("openi")
    for turn, job in enumerate(jobs):
        terms = names_of(job.study.findings, table, turn) or [SAYS_NOTHING]
        if turn % 20 == POOR:
            terms.append("Technical Quality of Image Unsatisfactory ")
        if turn % 20 == NOT_INDEXED:
            terms = ["No Indexing"]
        report = _xml(job.subject_id, terms, [image.image_id for image in job.images])
        write_text(folder / REPORTS / f"{job.subject_id}.xml", report)
    for extra in range(len(jobs) // WITHOUT_IMAGE):
        number = str(len(jobs) + 1 + extra)
        write_text(folder / REPORTS / f"{number}.xml", _xml(number, ["normal"], []))


def _xml(number: str, terms: list[str], images: list[str]) -> str:
    majors = "\n".join(f"      <major>{escape(term)}</major>" for term in terms)
    parents = "\n".join(
        f"   <parentImage id={quoteattr(name)}>\n      <figureId>F{place}</figureId>\n   </parentImage>"
        for place, name in enumerate(images, start=1)
    )
    return f"""<?xml version="1.0" encoding="utf-8"?>
<eCitation>
   <meta type="rr"/>
   <uId id="CXR{number}"/>
   <docSource>CXR</docSource>
   <MedlineCitation Owner="Synthetic" Status="synthetic">
      <Article><Abstract>
         <AbstractText Label="FINDINGS">Synthetic &amp; without meaning.</AbstractText>
      </Abstract></Article>
   </MedlineCitation>
   <MeSH>
{majors}
      <automatic>emphysema</automatic>
   </MeSH>
{parents}
</eCitation>
"""


OPENI = Layout(_jobs, _reports, source="openi", own=(REPORTS, IMAGES))
