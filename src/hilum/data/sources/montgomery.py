"""Montgomery County (tuberculosis): 138 PA films of 12 megapixels or more, `MCUCXR_0001_0.png`. See `films.py`.

A reading is "Patient's Sex: F", "Patient's Age: 027Y", then what was seen. Masks of the lungs
(`ManualMask/leftMask/MCUCXR_0001_0.png`) have the images' names; they are not read.
"""

import re

from hilum.data.films import FilmSet, Reading, read_films
from hilum.data.rows import SourceOptions, SourceRows

FIELD = re.compile(r"(?i)patient'?s\s+(sex|age)\s*:\s*(.*)")


def parse(lines: list[str]) -> Reading:
    """Sex and age from the lines that name them, the reading from the others."""
    fields, rest = {}, []
    for line in lines:
        found = FIELD.fullmatch(line)
        if found:
            fields[found[1].lower()] = found[2].strip()
        else:
            rest.append(line)
    return Reading(fields.get("sex", "")[:1].upper(), fields.get("age", ""), " ".join(rest))


FILMS = FilmSet("montgomery", "MCUCXR", "MontgomerySet", "PA", parse)


def read(options: SourceOptions) -> SourceRows:
    """Read the set; see `films.read_films`."""
    return read_films(options, FILMS)
