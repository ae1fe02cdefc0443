"""Each claim of the README has a test in `make test` that would fail without it."""

from __future__ import annotations

from pathlib import Path

from tests.claims import claimed_tests, claims_of_readme


def test_every_claim_has_a_test_and_every_marker_names_a_claim() -> None:
    claims = claims_of_readme()
    assert len(claims) > 5
    assert set(claimed_tests()) == set(claims)


def test_a_test_that_make_test_leaves_out_holds_no_claim(tmp_path: Path) -> None:
    (tmp_path / "test_one.py").write_text(
        'import pytest\n@pytest.mark.slow("why")\n@pytest.mark.claim("A")\ndef test_a(): pass\n'
        '@pytest.mark.claim("B")\ndef test_b(): pass\n'
    )
    (tmp_path / "test_two.py").write_text(
        "import pytest\npytestmark = [pytest.mark.production]\n"
        '@pytest.mark.claim("C")\ndef test_c(): pass\n'
    )
    assert claimed_tests(tmp_path) == {"B": ["test_one.py::test_b"]}
