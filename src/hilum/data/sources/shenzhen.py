"""Shenzhen No. 3 Hospital (tuberculosis): 662 films, `CHNCXR_0001_0.png`, most of them colour PNG. See `films.py`.

A reading is "male 45yrs", then what was seen. Spellings vary ("femal 32yrs", "Female, 28yrs", "male 16month").
Frontal by its paper; whether PA or AP is not said.
"""

import re

from hilum.data.films import FilmSet, Reading, read_films
from hilum.data.rows import SourceOptions, SourceRows

SEX = re.compile(r"(?i)\b(femal|mal|f|m)e?\b")
AGE = re.compile(r"(?i)\d{1,3}\s*(?:ye?a?r?s?|months?|days?|[ymd])?\b")


def parse(lines: list[str]) -> Reading:
    """Sex and age from the first line, the reading from the others."""
    first, rest = (lines[0], lines[1:]) if lines else ("", [])
    sex, age = SEX.search(first), AGE.search(first)
    if sex is None and age is None:  # no demographics: all of it is the reading
        return Reading("", "", " ".join(lines))
    return Reading(sex[1][0].upper() if sex else "", age[0] if age else "", " ".join(rest))


FILMS = FilmSet("shenzhen", "CHNCXR", "ChinaSet_AllFiles", "", parse)


def read(options: SourceOptions) -> SourceRows:
    """Read the set; see `films.read_films`."""
    return read_films(options, FILMS)
