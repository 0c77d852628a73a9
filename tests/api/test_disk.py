"""What must survive on disk: appended whole or not at all, by any number of threads."""

from __future__ import annotations

import json
import subprocess
import sys

APPENDING = """
import json, resource, sys, threading
from pathlib import Path
from tokenry.api.disk import StorageFull, append

path, limit = Path(sys.argv[1]), 4096 + 50
kept = []

def work(number):
    for i in range(40):
        line = f"{number:02}-{i:02}-{'x' * 93}\\n".encode()
        try:
            append(path, line)
            kept.append(line.decode())
        except StorageFull:
            pass

# the disk is full again and again, with half a line written each time
for _ in range(25):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    limit += 4096
print(json.dumps([sorted(kept), sorted(path.read_text().splitlines(True))]))
"""


def test_threads_that_append_to_a_full_disk_lose_no_line_and_leave_no_half_one(tmp_path):
    code = (sys.executable, "-c", APPENDING, str(tmp_path / "lines"))
    done = subprocess.run(code, capture_output=True, text=True, check=True)
    kept, written = json.loads(done.stdout)
    assert len(kept) > 800
    assert written == kept
