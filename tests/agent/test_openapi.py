"""docs/openapi.json is what the agent answers to, and no request that follows or breaks it meets a fault."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from inferos.agent.openapi import document

ROOT = Path(__file__).resolve().parents[2]
CAMPAIGN = ROOT / "tests" / "agent" / "api_campaign.py"


def test_the_document_in_docs_is_the_agents() -> None:
    kept = json.loads((ROOT / "docs" / "openapi.json").read_text(encoding="utf-8"))
    assert kept == json.loads(json.dumps(document())), "python -m inferos.agent.openapi > docs/openapi.json"


def campaign(cases: int) -> None:
    done = subprocess.run(
        [sys.executable, str(CAMPAIGN), str(cases)], capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]


def test_fifty_requests_an_operation_meet_no_fault() -> None:
    pytest.importorskip("schemathesis")
    campaign(50)


@pytest.mark.slow
def test_five_hundred_requests_an_operation_meet_no_fault() -> None:
    pytest.importorskip("schemathesis")
    campaign(500)
