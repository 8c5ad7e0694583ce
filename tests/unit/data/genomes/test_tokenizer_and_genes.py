# SPDX-License-Identifier: Apache-2.0
"""Tokens with GenSLM's numbers, and coding sequences from annotations and from pyrodigal."""

from pathlib import Path

import numpy as np
import pytest

from deepspeed_ds4sci.data.genomes import CODONS, SINGLE_NUCLEOTIDES, nucleotides, read_records
from deepspeed_ds4sci.data.genomes.documents import token_pieces
from deepspeed_ds4sci.data.genomes.genbank import CodingFeature, GenomeRecord
from deepspeed_ds4sci.data.genomes.genes import annotated_genes, called_genes
from deepspeed_ds4sci.data.genomes.tokenizer import CLS, SEP, UNK

DATA = Path(__file__).resolve().parents[4] / "examples" / "genslm" / "data"
TEXT = "ACGGTTCAAATGCCTTAGGC"


def encode(text, tokenizer=CODONS):
    return tokenizer.encode(nucleotides.encode(text.encode()))


def test_the_vocabulary_is_genslms():
    vocabulary = CODONS.vocabulary
    assert CODONS.vocab_size == len(vocabulary) == 69
    assert [vocabulary[name] for name in ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")] == [0, 1, 2, 3, 4]
    # Spot checks of the released file, from its ends and its middle.
    assert [vocabulary[codon] for codon in ("GGC", "ATG", "CGT", "TAA", "TGA", "TAG")] == [5, 10, 47, 65, 67, 68]
    assert len(set(CODONS.words)) == 64


def test_it_encodes_as_a_word_level_tokenizer_of_that_vocabulary_does():
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer(tokenizers.models.WordLevel(CODONS.vocabulary, unk_token="[UNK]"))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    codes = np.random.default_rng(0).integers(0, 5, 600).astype(np.uint8)
    text = nucleotides.decode(codes)
    split = " ".join(text[i : i + 3] for i in range(0, 600, 3))
    assert theirs.encode(split).ids == CODONS.encode(codes).tolist()


def test_ambiguous_codons_are_unknown_and_the_rest_is_dropped():
    tokens = encode("ATGNNNGGCTA")
    assert CODONS.decode(tokens) == "ATG [UNK] GGC"
    assert encode("AT").size == 0
    assert SINGLE_NUCLEOTIDES.decode(encode("ACNT", SINGLE_NUCLEOTIDES)) == "A C [UNK] T"


@pytest.mark.parametrize("tokenizer", [CODONS, SINGLE_NUCLEOTIDES], ids=lambda t: t.name)
def test_reverse_complement_of_tokens_is_that_of_their_nucleotides(tokenizer):
    codes = np.random.default_rng(1).integers(0, 4, 60).astype(np.uint8)
    expected = tokenizer.encode(nucleotides.reverse_complement(codes))
    assert np.array_equal(tokenizer.reverse_complement(tokenizer.encode(codes)), expected)
    ends = np.array([CLS, UNK, SEP], dtype=np.uint8)
    assert tokenizer.reverse_complement(ends).tolist() == [CLS, UNK, SEP]


def test_tokens_give_their_nucleotides_back():
    assert nucleotides.decode(CODONS.to_codes(encode("ATGTAA")).reshape(-1)) == "ATGTAA"
    assert (CODONS.to_codes(np.array([CLS])) == nucleotides.AMBIGUOUS).all()


@pytest.mark.parametrize(
    "location, codon_start, expected",
    [
        ("2..7", 1, "CGGTTC"),
        ("2..7", 2, "GGTTC"),
        ("complement(2..7)", 1, "GAACCG"),
        ("join(1..3,7..9)", 1, "ACGCAA"),
        ("complement(join(1..3,7..9))", 1, "TTGCGT"),
        ("<1..>3", 1, "ACG"),
        ("join(19..20,1..1)", 1, "GCA"),  # across the origin of a circle
    ],
)
def test_annotated_genes_follow_their_location(location, codon_start, expected):
    codes = nucleotides.encode(TEXT.encode())
    feature = CodingFeature(location, 7, codon_start)
    (gene,) = annotated_genes("f.gb", GenomeRecord("r", codes, (feature,), circular=True))
    assert nucleotides.decode(gene) == expected


def test_pseudo_and_remote_genes_are_left_out():
    codes = nucleotides.encode(TEXT.encode())
    features = (CodingFeature("1..6", 1, pseudo=True), CodingFeature("join(J00194.1:1..3,1..3)", 2))
    assert list(annotated_genes("f.gb", GenomeRecord("r", codes, features))) == []


@pytest.mark.parametrize("location", ["5..x", "19..25"])
def test_locations_that_do_not_fit_are_reported(location):
    record = GenomeRecord("r", nucleotides.encode(TEXT.encode()), (CodingFeature(location, 7),))
    with pytest.raises(ValueError, match=r"f\.gb:7: CDS "):
        list(annotated_genes("f.gb", record))


def test_real_annotations_agree_with_biopython():
    seq_io = pytest.importorskip("Bio.SeqIO")
    import gzip

    path = DATA / "NC_005816.gb.gz"
    with gzip.open(path, "rt") as file:
        theirs = next(seq_io.parse(file, "genbank"))
    (ours,) = read_records(path)
    assert nucleotides.decode(ours.codes) == str(theirs.seq) and ours.circular
    expected = [
        str(f.extract(theirs.seq)) for f in theirs.features if f.type == "CDS" and "pseudo" not in f.qualifiers
    ]
    assert [nucleotides.decode(gene) for gene in annotated_genes(str(path), ours)] == expected
    assert len(expected) > 5


def test_genes_called_in_lambda_are_open_reading_frames():
    pytest.importorskip("pyrodigal")
    (record,) = read_records(DATA / "lambda_virus.fa.gz")
    genes = [nucleotides.decode(gene) for gene in called_genes(record)]
    assert 50 <= len(genes) <= 75  # 73 are annotated
    for gene in genes[1:-1]:
        codons = [gene[i : i + 3] for i in range(0, len(gene), 3)]
        assert len(gene) % 3 == 0 and codons[-1] in ("TAA", "TAG", "TGA") and codons[0] in ("ATG", "GTG", "TTG")
        assert not {"TAA", "TAG", "TGA"} & set(codons[:-1])


def test_what_cannot_have_genes_is_refused(tmp_path):
    path = tmp_path / "a.fa"
    path.write_text(">one\nACGT\n")
    with pytest.raises(ValueError, match=r'a\.fa:1: sequences = "annotated" needs a GenBank file, got FASTA'):
        list(token_pieces(path, CODONS, "annotated"))
    with pytest.raises(ValueError, match=r"a\.fa:1: no coding sequence is called"):
        list(token_pieces(path, CODONS, "called"))
    with pytest.raises(ValueError, match="sequences must be one of genome, annotated, called, genes, got 'all'"):
        list(token_pieces(path, CODONS, "all"))


def test_genes_are_the_annotated_ones_where_there_are_any():
    pytest.importorskip("pyrodigal")
    for name, sequences in (("NC_005816.gb.gz", "annotated"), ("MN908947.3.fasta.gz", "called")):
        genes, expected = (list(token_pieces(DATA / name, CODONS, kind)) for kind in ("genes", sequences))
        assert [piece.tokens.tolist() for piece in genes] == [piece.tokens.tolist() for piece in expected]
