"""The storage behind the test Hub's xet files: chunks in, files out. Layout as in huggingface.co/docs/xet."""

from __future__ import annotations

import hashlib
import re
import struct

HEADER, FOOTER_FLAG, ENTRY, CHUNK_HEADER = 48, b"\xff" * 32, 48, 8
HAS_VERIFICATION, HAS_SHA256 = 1 << 31, 1 << 30


def hash_text(raw: bytes) -> str:
    """32 bytes as xet writes them: each group of 8 reversed, then hex."""
    return b"".join(raw[start : start + 8][::-1] for start in range(0, 32, 8)).hex()


class XetStore:
    """Xorbs by their hash, files as lists of terms."""

    def __init__(self, hub):
        self.hub = hub
        self.xorbs: dict[str, bytes] = {}
        self.terms: dict[str, list[tuple[str, int, int, int]]] = {}
        """File hash -> (xorb hash, bytes, first chunk, last chunk + 1)."""
        self.files_by_sha256: dict[str, str] = {}

    def handle(self, request, rest: str):
        method, name = request.command, rest.rsplit("/", 1)[-1]
        if method == "POST" and rest.startswith("v1/xorbs/"):
            self.xorbs[name] = request.body
            return request.answer_json(200, {"was_inserted": True})
        if method == "POST" and rest == "v1/shards":
            self.read_shard(request.body)
            return request.answer_json(200, {"result": 1})
        if method == "GET" and rest.startswith("v1/reconstructions/") and name in self.terms:
            return request.answer_json(200, self.reconstruction(name, request.headers.get("Range")))
        if method == "GET" and rest.startswith("data/"):
            first, last = map(int, re.match(r"bytes=(\d+)-(\d+)", request.headers["Range"]).groups())
            data = self.xorbs[name][first : last + 1]
            return request.answer(206, data, {"Content-Range": f"bytes {first}-{last}/{len(self.xorbs[name])}"})
        return request.answer(404, b"")

    def read_shard(self, shard: bytes) -> None:
        position = HEADER
        while (start := shard[position : position + 32]) != FOOTER_FLAG:
            flags, count = struct.unpack_from("<II", shard, position + 32)
            position += ENTRY
            terms = []
            for _ in range(count):
                _, num_bytes, first, end = struct.unpack_from("<IIII", shard, position + 32)
                terms.append((hash_text(shard[position : position + 32]), num_bytes, first, end))
                position += ENTRY
            if flags & HAS_VERIFICATION:
                position += ENTRY * count
            name = hash_text(start)
            self.terms[name] = terms
            if flags & HAS_SHA256:
                self.files_by_sha256[hash_text(shard[position : position + 32])] = name
                position += ENTRY

    def content(self, sha256: str) -> bytes | None:
        """A file rebuilt from its chunks; None if it never arrived."""
        terms = self.terms.get(self.files_by_sha256.get(sha256, ""))
        if terms is None:
            return None
        data = b"".join(
            self.chunk(xorb, *span) for xorb, _, first, end in terms for span in self.spans(xorb)[first:end]
        )
        assert hashlib.sha256(data).hexdigest() == sha256
        return data

    def spans(self, xorb: str) -> list[tuple[int, int]]:
        """(start, end) of each chunk with its header."""
        data, spans, position = self.xorbs[xorb], [], 0
        while position + CHUNK_HEADER <= len(data) and data[position] == 0:
            end = position + CHUNK_HEADER + int.from_bytes(data[position + 1 : position + 4], "little")
            spans.append((position, end))
            position = end
        return spans

    def chunk(self, xorb: str, start: int, end: int) -> bytes:
        data = self.xorbs[xorb][start:end]
        scheme, body = data[4], data[CHUNK_HEADER:]
        size = int.from_bytes(data[5:8], "little")
        if scheme == 0:
            return body
        body = lz4_frame(body)
        if scheme == 2:  # all first bytes of groups of four, then all second ones, ...
            grouped, position = bytearray(size), 0
            for offset in range(4):
                length = len(range(offset, size, 4))
                grouped[offset::4] = body[position : position + length]
                position += length
            body = bytes(grouped)
        assert len(body) == size
        return body

    def reconstruction(self, name: str, wanted: str | None) -> dict:
        terms = self.terms[name]
        first_byte, last_byte = 0, sum(term[1] for term in terms) - 1
        if wanted:
            first_byte, last_byte = map(int, re.match(r"bytes=(\d+)-(\d+)", wanted).groups())
        used, offset, before = [], 0, 0
        for term in terms:
            if before + term[1] > first_byte and before <= last_byte:
                if not used:
                    offset = first_byte - before
                used.append(term)
            before += term[1]
        fetch: dict[str, list] = {}
        for xorb, _, first, end in used:
            spans = self.spans(xorb)
            entry = {
                "range": {"start": first, "end": end},
                "url": f"http://localhost:{self.hub.port}/xet/data/{xorb}",
                "url_range": {"start": spans[first][0], "end": spans[end - 1][1] - 1},
            }
            if entry not in fetch.setdefault(xorb, []):
                fetch[xorb].append(entry)
        return {
            "offset_into_first_range": offset,
            "terms": [
                {"hash": xorb, "unpacked_length": size, "range": {"start": first, "end": end}}
                for xorb, size, first, end in used
            ],
            "fetch_info": fetch,
        }


def lz4_frame(frame: bytes) -> bytes:
    """Content of an LZ4 frame."""
    flags, position = frame[4], 6
    position += 8 * bool(flags & 8) + 4 * bool(flags & 1) + 1
    output = bytearray()
    while (word := int.from_bytes(frame[position : position + 4], "little")) != 0:
        position += 4
        block = frame[position : position + (word & 0x7FFFFFFF)]
        position += len(block) + 4 * bool(flags & 16)
        if word >> 31:
            output += block
        else:
            _lz4_block(block, output)
    return bytes(output)


def _lz4_block(block: bytes, output: bytearray) -> None:
    position = 0

    def length(value: int) -> int:
        nonlocal position
        if value == 15:
            while True:
                more = block[position]
                position += 1
                value += more
                if more != 255:
                    break
        return value

    while position < len(block):
        token = block[position]
        position += 1
        count = length(token >> 4)
        output += block[position : position + count]
        position += count
        if position >= len(block):
            return
        distance = int.from_bytes(block[position : position + 2], "little")
        position += 2
        count = length(token & 15) + 4
        start = len(output) - distance
        if distance >= count:
            output += output[start : start + count]
        else:
            pattern = bytes(output[start:])
            output += (pattern * (count // distance + 1))[:count]
