"""The documents say what is there: addresses, codes, and tests by name."""

import re
from pathlib import Path

from hilum.deploy.server import errors

ROOT = Path(__file__).resolve().parents[2]
HTTP = (ROOT / "docs" / "reference" / "http.md").read_text(encoding="utf-8")
SECURITY = (ROOT / "docs" / "reference" / "security.md").read_text(encoding="utf-8")


def test_the_api_has_these_addresses_and_no_others(server) -> None:
    """None of them takes a model, a path or an address."""
    described = server.ask("GET", "/openapi.json").json
    found = {f"{method.upper()} {path}" for path, methods in described["paths"].items() for method in methods}
    documented = {
        one.partition("?")[0] for one in re.findall(r"^\| `((?:GET|POST|DELETE) /[^`]*)`", HTTP, re.MULTILINE)
    }
    assert found == documented - {"GET /openapi.json"}
    parameters = {one["name"] for methods in described["paths"].values() for operation in methods.values()
                  for one in operation.get("parameters", [])}  # fmt: skip
    assert parameters == {"study", "number", "finding", "row", "count"}
    assert {method for methods in described["paths"].values() for method in methods} == {"get", "post", "delete"}


def test_every_code_is_documented() -> None:
    source = "".join(path.read_text() for path in (ROOT / "src" / "hilum" / "deploy" / "server").glob("*.py"))
    codes = set(re.findall(r'RefusedError\(\s*\d{3}, "(\w+)"', source)) | set(re.findall(r'busy\("(\w+)"', source))
    codes |= {code for code, _ in errors.STATUS.values()}
    table = HTTP[HTTP.index("| status | codes |") :]
    assert len(codes) > 25
    assert {code for code in codes if f"`{code}`" not in table} == set()


def test_every_row_of_the_threat_table_names_tests_that_exist() -> None:
    table = SECURITY[SECURITY.index("| threat |") : SECURITY.index("## What was measured")]
    rows = [line for line in table.splitlines()[2:] if line.startswith("|")]
    assert len(rows) >= 17
    for row in rows:
        cells = row.split(" | ")
        named = re.findall(r"`((?:\w+\.py)?)::(\w+)`", cells[-1])
        file = ""
        for name, test in named:
            file = name or file
            text = (ROOT / "tests" / "server" / file).read_text(encoding="utf-8")
            assert f"def {test}(" in text, (file, test)
        assert named or "the same" in cells[-1], row
