"""Similar cases: the nearest studies of an index, and what may be shown of them."""

from pathlib import Path
from typing import Any

import polars as pl

from hilum.core.errors import CheckpointError, HilumError
from hilum.data.licences import licences
from hilum.deploy.embeddings import embed_finding
from hilum.deploy.predictor import Model
from hilum.deploy.server.errors import RefusedError
from hilum.deploy.server.results import Study
from hilum.deploy.similar import Index, Match


class Cases:
    """An index, as the server asks it.

    Args:
        index: made with the backbone of `model`.
        model: of the server.
        shared: other machines can ask: images, study ids and labels are shown only where the licence of their dataset
            lets images be.

    Raises:
        CheckpointError: the index was made with another backbone.
    """

    def __init__(self, index: Index, model: Model, shared: bool) -> None:
        index.matches(model)
        self.index, self.model = index, model
        self.hidden = _hidden_datasets(index) if shared else frozenset[str]()
        """Datasets of whose cases picture, study id and labels are not shown; "" among them: all."""
        self._findings: dict[str, Index] = {}

    def similar(self, study: Study, count: int, finding: str | None) -> dict[str, Any]:
        """The nearest cases of a study, by its images or by what one finding's query pools from them.

        Its own patient's are left out, as far as the headers of its files said whose they are.

        Args:
            study: a remembered one.
            count: how many.
            finding: by this one's query; None: by the images.

        Raises:
            RefusedError: 404 no such finding in the index, 422 nothing of the study was scored.
        """
        if study.embedding is None or not study.model_views:
            raise RefusedError(422, "withheld", "Nothing of this study was scored, so there is nothing to compare.")
        matches = (
            self.index.search(study.embedding, count, banned=study.own_cases)
            if finding is None
            else self._by_finding(study, count, finding)
        )
        return {"cases": [self._case(rank, match) for rank, match in enumerate(matches, 1)]}

    def thumbnail(self, row: int) -> bytes:
        """PNG of one case.

        Raises:
            RefusedError: 404; no such row, its image may not be shown, or the store it is in has gone.
        """
        from hilum.deploy.overlays import png

        try:
            if row < len(self.index) and not self._is_hidden(self.index.case(row)):
                return png(self.index.thumbnail(row))
        except HilumError as error:
            raise RefusedError(404, "no_picture", "The picture of that case cannot be had any more.") from error
        raise RefusedError(404, "no_picture", "There is no such case, or its picture may not be shown.")

    def _by_finding(self, study: Study, count: int, finding: str) -> list[Match]:
        if finding not in self.index.findings:
            raise RefusedError(404, "no_finding", "The index has no query of that finding; search by the images.")
        if finding not in self._findings:
            asked = self.index.finding(finding)
            try:
                asked.matches(self.model)
            except CheckpointError as error:
                raise RefusedError(404, "no_finding", "The index is of another head than this model's.") from error
            self._findings[finding] = asked
        views = [one for one, scored in zip(study.model_views, study.scored, strict=True) if scored]
        query = embed_finding(self.model, [pixels for pixels, _ in views], finding, [name for _, name in views])
        return self._findings[finding].search(query, count, banned=study.own_cases)

    def _is_hidden(self, match: Match) -> bool:
        return bool(self.hidden & {"", match.dataset})

    def _case(self, rank: int, match: Match) -> dict[str, Any]:
        hidden = self._is_hidden(match)
        return {
            "rank": rank,
            "similarity": match.similarity,
            "study_id": None if hidden else match.study_id,
            "dataset": match.dataset,
            "view": match.view,
            "findings": None if hidden else match.positive,
            "thumbnail": None if hidden else f"/api/cases/{match.row}.png",
        }


def _hidden_datasets(index: Index) -> frozenset[str]:
    """Datasets whose images the licence table does not let out; all ("") where the store does not tell."""
    recorded = index.header["store"]
    places = (index.path / recorded["relative"] / "manifest.parquet", Path(recorded["path"]) / "manifest.parquet")
    there = next((place for place in places if place.is_file()), None)
    if there is None:
        return frozenset({""})
    tags = pl.read_parquet(there, columns=["dataset", "licence_tag"]).unique()
    table = licences()
    hidden = [
        str(dataset) for dataset, tag in tags.iter_rows() if tag not in table or not table[str(tag)].may_show_thumbnails
    ]
    return frozenset(hidden)
