"""Minutes of mixed load: benchmarks/soak.py, which says what it looks at. MALTU_SOAK_MINUTES: 10 where not said."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.soak
def test_a_server_under_mixed_load_does_nothing_wrong() -> None:
    minutes = os.environ.get("MALTU_SOAK_MINUTES", "10")
    words = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--minutes", minutes]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    sys.stdout.write(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
