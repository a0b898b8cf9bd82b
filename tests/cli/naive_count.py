#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Counts the contents of dumps by sorting all of their pages' bytes, and compares every number with
what `memctl analyze` says.

usage: naive_count.py MEMCTL DIRECTORY SEED

The dumps are made in DIRECTORY, by chance that follows from SEED: near-duplicates that differ in
their first, last or some byte; runs that repeat at odd places; alternating pages; zeros. Each is
written as a raw dump or as an ELF core of 32 or 64 bits, whose segments are in no order. Prints
nothing when all agrees."""
import json
import random
import struct
import subprocess
import sys

PAGE = 4096
UNITS = (PAGE, 65536, 2 << 20)


# ---- dumps ----

def near(page, chance):
    """The same page but for one byte."""
    at = chance.choice((0, PAGE - 1, PAGE - 8, chance.randrange(PAGE)))
    return page[:at] + bytes([page[at] ^ (1 << chance.randrange(8))]) + page[at + 1:]


def piece(kind, pool, chance):
    one, other = chance.choice(pool), chance.choice(pool)
    count = chance.randrange(1, 60)
    if kind == "equal":
        return [one] * count
    if kind == "alternating":
        return [one, other] * count
    if kind == "zero":
        return [bytes(PAGE)] * chance.choice((1, count, 512 + count))
    if kind == "last bytes":
        return [one[:-8] + struct.pack("<Q", chance.randrange(40)) for _ in range(count)]
    if kind == "near":
        return [near(one, chance) for _ in range(count)]
    if kind == "almost zero":
        return [near(bytes(PAGE), chance) for _ in range(count)]
    if kind == "block":  # 64 KiB that come again, wherever
        start = chance.randrange(len(pool) - 16)
        return pool[start:start + 16]
    return [chance.randbytes(PAGE) for _ in range(count)]


def make_pages(pool, chance):
    kinds = ("equal", "alternating", "zero", "last bytes", "near", "almost zero", "block", "block", "random")
    pages = []
    while len(pages) < chance.randrange(200, 2500):
        pages += piece(chance.choice(kinds), pool, chance)
    for _ in range(chance.randrange(3)):  # a long stretch again, which makes equal units of 2 MiB
        start = chance.randrange(len(pages))
        pages += [bytes(PAGE)] * (-len(pages) % chance.choice((1, 16, 512)))
        pages += pages[start:start + 700]
    return pages


# ---- files ----

def core(pages, chance):
    """An ELF core of these pages: pieces at ascending addresses, and in the file in any order."""
    wide, order = chance.random() < .7, chance.choice("<>")
    cuts = sorted({0, len(pages), *(chance.randrange(len(pages)) for _ in range(chance.randrange(6)))})
    pieces, address = [], 0
    for start, end in zip(cuts, cuts[1:]):
        filled = end
        while filled > start and not any(pages[filled - 1]) and chance.random() < .9:
            filled -= 1  # zeros at the end of a segment need not be in the file
        pieces.append((address, pages[start:filled], end - start))
        address += (end - start + chance.randrange(3)) * PAGE
    chance.shuffle(pieces)
    head, header = (64, 56) if wide else (52, 32)
    at = head + header * len(pieces) + chance.randrange(5000)
    headers, body = b"", bytes(at - head - header * len(pieces))
    for where, data, count in pieces:
        sizes = (len(data) * PAGE, count * PAGE)
        headers += (struct.pack(order + "IIQQQQQQ", 1, 6, at, 0, where, *sizes, 0) if wide else
                    struct.pack(order + "IIIIIIII", 1, at, 0, where, *sizes, 6, 0))
        body += b"".join(data)
        at += len(data) * PAGE
    ident = b"\x7fELF" + bytes([2 if wide else 1, 1 if order == "<" else 2, 1]) + bytes(9)
    rest = struct.pack(order + ("HHIQQQIHHHHHH" if wide else "HHIIIIIHHHHHH"),
                       4, 62, 1, 0, head, 0, 0, head, header, len(pieces), 0, 0, 0)
    return ident + rest + headers + body


def write(path, pages, chance):
    with open(path, "wb") as file:
        file.write(core(pages, chance) if chance.random() < .5 else b"".join(pages))


# ---- counting ----

def units(pages, size):
    data = b"".join(pages)
    data += bytes(-len(data) % size)
    return [data[at:at + size] for at in range(0, len(data), size)]


def distinct(contents):
    """How many there are, by sorting them."""
    ordered = sorted(contents)
    return sum(1 for i, one in enumerate(ordered) if i == 0 or ordered[i - 1] != one)


def count(sources, size):
    split = [units(pages, size) for pages in sources]
    full = [[unit for unit in source if any(unit)] for source in split]
    every = [unit for source in full for unit in source]
    total, unique = sum(map(len, split)), distinct(every)
    zero = total - len(every)
    intra = sum(len(source) - distinct(source) for source in full)
    kept = unique + (zero > 0)
    return {"page_bytes": size, "pages": total, "zero_pages": zero, "unique_contents": unique,
            "duplicate_pages": len(every) - unique, "intra_guest_duplicates": intra,
            "inter_guest_duplicates": len(every) - unique - intra,
            "saved_bytes": size * (total - kept), "ratio": round(total / kept, 6)}


def compare(what, got, sources):
    for size in UNITS:
        found = got if size == PAGE else got["granularities"][str(size)]
        for name, want in count(sources, size).items():
            have = round(found[name], 6) if name == "ratio" else found[name]
            if have != want:
                sys.exit(f"{what}, {name} in units of {size}: memctl says {have}, sorting {want}")


def main():
    memctl, directory, seed = sys.argv[1:]
    chance = random.Random(int(seed))
    pool = [chance.randbytes(PAGE) for _ in range(60)]
    pool += [near(chance.choice(pool), chance) for _ in range(20)]
    sources = [make_pages(pool, chance) for _ in range(chance.randrange(1, 5))]
    paths = [f"{directory}/dump{i}" for i in range(len(sources))]
    for path, pages in zip(paths, sources):
        write(path, pages, chance)
    member = [chance.choice(("red", "blue")) for _ in sources]
    names = sorted(set(member))
    domains = [f"--domain={name}={','.join(p for p, m in zip(paths, member) if m == name)}" for name in names]
    done = subprocess.run([memctl, "analyze", "--json", *domains, *paths], check=True, stdout=subprocess.PIPE)
    got = json.loads(done.stdout)
    compare("all", got, sources)
    for i, pages in enumerate(sources):
        compare(paths[i], got["sources"][i], [pages])
    inside = {d["name"]: d for d in got["domains"]}
    kept = got["zero_pages"] > 0
    for name in names:
        members = [pages for pages, m in zip(sources, member) if m == name]
        compare(f"domain {name}", inside[name], members)
        kept += inside[name]["unique_contents"]
    if got["what_if"]["these_domains"]["saved_bytes"] != PAGE * (got["pages"] - kept):
        sys.exit(f"these domains: {got['what_if']} but {kept} pages are kept")


if __name__ == "__main__":
    main()
