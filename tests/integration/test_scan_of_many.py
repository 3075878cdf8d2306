"""A bucket of a million keys, listed over HTTP page by page as S3 does it, of which a thousand are new."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.cluster import ROOT

SEEN, NEW = 1_000_000, 1_000
_CONTENT = (
    "<Contents><Key>in/{0:08d}.png</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
    "<ETag>&quot;{0:032x}&quot;</ETag><Size>1000</Size><StorageClass>STANDARD</StorageClass></Contents>"
)

# A process of its own, whose peak of memory is that of a scan up to the moment at which its window is fixed. It reads
# VmHWM, since `ru_maxrss` of a child starts at what its parent had.
_SCRIPT = """
import json, re, sys, time
from collections import Counter
from pathlib import Path
import pyarrow as pa
from manifpt.monitoring.inventory import write_inventory
from manifpt.monitoring.windows import plan_window
from manifpt.plan import Plan

output, seen = sys.argv[1], int(sys.argv[2])

def tables():
    for start in range(0, seen, 16384):
        numbers = range(start, min(start + 16384, seen))
        uris, etags = [f"s3://b/in/{n:08d}.png" for n in numbers], [f"{n:032x}" for n in numbers]
        yield pa.table({"uri": uris, "etag": etags, "present": [True] * len(numbers)})

write_inventory(output, 1, tables())
template = Plan(task="attributions", manifest_uri="", manifest_digest="", rows=0, shard_rows=1024, spaces=())
begin = time.monotonic()
window = plan_window(["s3://b/in"], output, 2, template, 0.0, Counter())
peak_mib = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
said = {"found": window.objects, "rows": window.plan.rows, "s": time.monotonic() - begin, "peak_mib": peak_mib}
print(json.dumps(said))
"""


class _Listing(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        start = int(query.get("continuation-token", ["0"])[0])
        stop = min(start + 1000, SEEN + NEW)
        more = f"<NextContinuationToken>{stop}</NextContinuationToken>" if stop < SEEN + NEW else ""
        body = (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult><Name>b</Name><Prefix>in/</Prefix>'
            f"<KeyCount>{stop - start}</KeyCount><MaxKeys>1000</MaxKeys><IsTruncated>{str(bool(more)).lower()}"
            f"</IsTruncated>{more}{''.join(map(_CONTENT.format, range(start, stop)))}</ListBucketResult>"
        ).encode()
        self._answer(200, body)

    def do_HEAD(self) -> None:
        self._answer(404, b"")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Listing)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join(10)


def test_a_thousand_new_keys_among_a_million_are_found_in_a_minute_and_in_500_mib(
    tmp_path: Path, endpoint: str
) -> None:
    environment = {
        **os.environ, "AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": endpoint, "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(tmp_path), str(SEEN)],
        env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert (found["found"], found["rows"]) == ({"new": NEW}, NEW)
    assert found["s"] < 60, found
    assert found["peak_mib"] < 500, found
