#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Gets bacterial genomes out of Debian packages, without installing them: E. coli, H. pylori, S. aureus, V. cholerae,
# Klebsiella, Leptospira (GenBank with annotations), a chloroplast, HIV-1. About 57 MB are downloaded.
#
#   bash fetch_genomes.sh [FOLDER]    default: data/fetched
#
# Needs apt-get (after `apt-get update`), dpkg, gzip and xz. ACCESSIONS.tsv in the folder lists each record.
set -euo pipefail
folder=$(mkdir -p "${1:-$(dirname "$0")/data/fetched}" && cd "${1:-$(dirname "$0")/data/fetched}" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"

packages=(ragout-examples kleborate-examples any2fasta-examples python-biopython-doc)
for package in "${packages[@]}"; do
    apt-get download -qq "$package" 2>/dev/null || {
        echo "fetch_genomes: apt-get download $package failed; run apt-get update first, on Debian or Ubuntu" >&2
        exit 1
    }
    dpkg-deb -x "${package}"_*.deb unpacked
done

docs=unpacked/usr/share/doc
# Strains from ragout: folder, file -> species_strain.
while read -r source target; do
    cp "$docs/ragout/examples/$source.fasta.gz" "$folder/$target.fa.gz"
done <<LIST
E.Coli/references/MG1655-K12 Escherichia_coli_K12_MG1655
E.Coli/references/DH1 Escherichia_coli_DH1
H.Pylori/references/G27 Helicobacter_pylori_G27
H.Pylori/references/ELS37 Helicobacter_pylori_ELS37
S.Aureus/references/N315 Staphylococcus_aureus_N315
S.Aureus/references/COL Staphylococcus_aureus_COL
V.Cholerae/references/O395 Vibrio_cholerae_O395
V.Cholerae/references/O1_biovar Vibrio_cholerae_O1_biovar
LIST
for strain in MGH78578 NTUH-K2044 Klebs_HS11286 Klebs_Kp1084; do
    xz -dc "$docs/kleborate/examples/data/$strain.fna.xz" | gzip > "$folder/Klebsiella_${strain#Klebs_}.fa.gz"
done
cp "$docs/any2fasta/examples/test.gbk.gz" "$folder/Leptospira_kirschneri_H1.gbk.gz"
tests=$docs/python-biopython-doc/Tests
cp "$tests/GenBank/NC_000932.gb.gz" "$folder/Arabidopsis_chloroplast_NC_000932.gb.gz"
cp "$tests/GFF/NC_001802.fna.gz" "$folder/HIV1_NC_001802.fa.gz"

{
    printf 'file\trecord\n'
    for file in "$folder"/*.gz; do
        # `|| true`: with pipefail, zcat would fail when head has read enough.
        { zcat "$file" | grep -E '^(>|VERSION)' | head -5 | sed -e 's/^>//' -e 's/^VERSION *//' || true; } |
            while read -r record; do printf '%s\t%s\n' "$(basename "$file")" "$record"; done
    done
} > "$folder/ACCESSIONS.tsv"
echo "fetch_genomes: $(find "$folder" -name '*.gz' | wc -l) genomes in $folder"
