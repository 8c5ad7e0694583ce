# SPDX-License-Identifier: Apache-2.0
"""FASTA and GenBank readers: plain and compressed, in blocks of any size, and every way a file can be wrong."""

import gzip

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed_ds4sci.data.genomes import fasta, nucleotides, read_records

LOCUS = "LOCUS       TEST1 {} bp    DNA     {} SYN 01-JAN-2000\n"
GENBANK = (
    LOCUS.format(70, "circular")
    + """DEFINITION  made up.
FEATURES             Location/Qualifiers
     source          1..70
     CDS             join(2..4,
                     6..11)
                     /note="a note with a / slash"
                     /codon_start=2
     CDS             complement(20..25)
                     /pseudo
ORIGIN
        1 acgtacgtac gtacgtacgt acgtacgtac gtacgtacgt acgtacgtac gtacgtacgt
       61 acgtacgtnn
//
"""
)


def write(tmp_path, name, text):
    path = tmp_path / name
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def read(path):
    return [(record.name, nucleotides.decode(record.codes)) for record in read_records(path)]


@pytest.mark.parametrize("name", ["a.fa", "a.fa.gz"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_fasta_records(tmp_path, name, newline):
    text = newline.join([">one first", "ACGT", "", "acgu n", ">two", "RYSWKMBDHVN", ""])
    assert read(write(tmp_path, name, text)) == [("one", "ACGTACGTN"), ("two", "N" * 11)]


def test_a_last_line_without_an_end_counts(tmp_path):
    assert read(write(tmp_path, "a.fa", ">one\nAC\nGT")) == [("one", "ACGT")]


@settings(max_examples=60, deadline=None)
@given(
    records=st.lists(st.text("ACGTN", min_size=1, max_size=30), min_size=1, max_size=4),
    width=st.integers(1, 12),
    block=st.integers(1, 40),
)
def test_blocks_of_any_size_give_the_same_records(tmp_path_factory, records, width, block):
    lines = []
    for number, text in enumerate(records):
        lines += [f">r{number} described", *(text[i : i + width] for i in range(0, len(text), width))]
    path = tmp_path_factory.getbasetemp() / "blocks.fa"
    path.write_text("\n".join(lines) + "\n")
    scanner = fasta._Scanner(path)
    data = path.read_bytes()
    pieces = [piece for i in range(0, len(data), block) for piece in scanner.feed(data[i : i + block])]
    pieces += scanner.finish()
    found = {}
    for piece in pieces:
        found[piece.name] = found.get(piece.name, "") + nucleotides.decode(piece.codes)
    assert list(found.values()) == records and sum(piece.ends for piece in pieces) == len(records)
    assert scanner.line == len(lines) + 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("", ":1: the file is empty"),
        ("\n \n", ":1: the file is empty"),
        ("\nACGT\n", ":2: expected '>name', got 'ACGT'"),
        (">one\n>two\nAC\n", ":1: 'one' has no sequence"),
        (">one\nAC\n>two\n\n", ":3: 'two' has no sequence"),
        (">one\nAC\n> \nAC\n", ":3: expected a name after '>', got none"),
        (">one\nAC\n>", ":3: expected a name after '>', got none"),
        (">one\nAC\n\nAC GX\nA\n", ":4: 'one' has 'X', expected a nucleotide"),
        (">one\nAC\nA-C\n", ":3: 'one' has '-', expected a nucleotide"),
        (">one\nAC>GT\n", ":2: 'one' has '>', expected a nucleotide"),
    ],
)
def test_malformed_fasta_is_reported_with_its_line(tmp_path, text, message):
    path = write(tmp_path, "bad.fa", text)
    with pytest.raises(ValueError, match=f"{path.name}{message}".replace("(", r"\(")):
        read(path)


def test_damaged_gzip_data_is_reported(tmp_path):
    whole = gzip.compress(b">one\n" + b"ACGT\n" * 200_000, 0)
    path = write(tmp_path, "cut.fa", whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.fa:\d+: damaged gzip data"):
        read(path)


def test_genbank_record(tmp_path):
    for name in ("a.gb", "a.gb.gz"):
        (record,) = read_records(write(tmp_path, name, GENBANK))
        assert record.name == "TEST1" and record.circular
        assert nucleotides.decode(record.codes) == "ACGT" * 17 + "NN"
        assert [(f.location, f.line, f.codon_start, f.pseudo) for f in record.features] == [
            ("join(2..4,6..11)", 5, 2, False),
            ("complement(20..25)", 9, 1, True),
        ]


def test_several_genbank_records(tmp_path):
    second = GENBANK.replace("TEST1", "TEST2").replace("circular", "linear  ")
    names = [(record.name, record.circular) for record in read_records(write(tmp_path, "a.gb", GENBANK + second))]
    assert names == [("TEST1", True), ("TEST2", False)]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.replace("//", ""), ":14: 'TEST1' ends without '//'; is the file complete"),
        (lambda t: t.replace("//", "LOCUS"), ":14: 'TEST1' of line 1 ends without '//'"),
        (lambda t: t.replace("70 bp", "71 bp"), ":14: 'TEST1' has 70 nucleotides, expected 71"),
        (lambda t: t.replace("70 bp", "70 aa"), ":1: expected 'LOCUS name length bp"),
        (lambda t: t.replace("       61", "       62"), ":13: expected sequence from nucleotide 61 on, got '62 acg"),
        (lambda t: t.replace("acgtacgtnn", "acgt*cgtnn"), ":13: 'TEST1' has '\\*', expected a nucleotide"),
        (lambda t: t.replace("codon_start=2", "codon_start=4"), ":5: /codon_start must be 1, 2 or 3, got '4'"),
        (lambda t: t[: t.index("        1 acg")] + "//\n", ":1: 'TEST1' has no sequence"),
        (lambda t: t + "rubbish\n", ":15: expected 'LOCUS', got 'rubbish'"),
    ],
)
def test_malformed_genbank_is_reported_with_its_line(tmp_path, change, message):
    path = write(tmp_path, "bad.gb", change(GENBANK))
    with pytest.raises(ValueError, match=f"{path.name}{message}"):
        read(path)


def test_reverse_complement_and_codes():
    codes = nucleotides.encode(b"AACGTn")
    assert codes.tolist() == [0, 0, 1, 2, 3, 4]
    assert nucleotides.decode(nucleotides.reverse_complement(codes)) == "NACGTT"
    assert (nucleotides.encode(b"-*>E") == nucleotides.INVALID).all()
    assert np.array_equal(nucleotides.encode(b"acgu"), nucleotides.encode(b"ACGT"))
