"""Files of documents, good and bad."""

from __future__ import annotations

import os
from pathlib import Path


def pdf(text: str) -> bytes:
    """A PDF of one page with one line of text, written by hand."""
    stream = f"BT /F1 12 Tf 40 700 Td ({text}) Tj ET".encode()
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/Contents 4 0 R/MediaBox[0 0 600 800]"
        b"/Resources<</Font<</F1<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>>>>>>>",
        b"<</Length %d>>stream\n%s\nendstream" % (len(stream), stream),
    ]
    body, offsets = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        offsets.append(len(body))
        body += b"%d 0 obj%s endobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    return (
        body
        + b"xref\n0 5\n0000000000 65535 f \n"
        + table
        + b"trailer<</Size 5/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % len(body)
    )


def bad_folder(root: Path) -> dict[str, str]:
    """Files that nobody can use -> what the warning says of each."""
    (root / "empty.txt").touch()
    (root / "blank.md").write_text(" \n\n ---\n")
    (root / "binary.txt").write_bytes(bytes(range(256)) * 40)
    (root / "zeros.txt").write_bytes(bytes(4096))
    (root / "gone.html").symlink_to(root / "nowhere.html")
    (root / "broken.pdf").write_bytes(b"%PDF-1.4\nnot a PDF")
    (root / "script.html").write_text("<script>only('code')</script>")
    os.mkfifo(root / "pipe.txt")
    with open(root / "huge.txt", "wb") as file:
        file.truncate(65 << 20)
    (root / "folder.md").mkdir()
    return {
        "empty.txt": "it holds no text",
        "blank.md": "it holds no text",
        "binary.txt": "it is binary, not text",
        "zeros.txt": "it is binary, not text",
        "gone.html": "No such file",
        "broken.pdf": "it is not a PDF",
        "script.html": "it holds no text",
        "pipe.txt": "it is not a regular file",
        "huge.txt": "65 MiB is more than 64 MiB",
    }
