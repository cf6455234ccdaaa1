"""A thousand kills of four writers, on a real disk: ``pytest tests/campaign/test_kills.py``."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

KILLS = 1000


def shorter_form():
    spec = spec_from_file_location("kills", Path(__file__).parents[1] / "test_store_kills.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_thousand_kills_lose_nothing_that_was_acknowledged(tmp_path, capsys):
    told = shorter_form().campaign(tmp_path / "store", KILLS)
    assert told["killed"] == KILLS
    with capsys.disabled():
        print(f"\n{told}")
