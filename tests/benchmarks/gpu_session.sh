#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Everything that needs a GPU, in one call, each stage bounded in time; a failing stage does not stop the next.
#
#     bash tests/benchmarks/gpu_session.sh setup build report test sanitize bench memory host block profile
#
# setup     build/gpu-venv with the wheels of .whl/ that are missing and this project; needs no registry. The other
#           stages run its Python if it exists, else ${PYTHON:-python3}
# build     compiles the kernels just in time and opens the library
# report    what would run here and why
# test      tests marked gpu                                PYTEST_ARGS   (default: tests -m gpu -q)
# sanitize  memcheck, racecheck, initcheck, synccheck at once               SANITIZE_ARGS
# bench     the table, its record and its plot              BENCH_ARGS    (default: --graph)
# memory    peak memory only                                MEMORY_ARGS   (default: --shapes triangle-1024)
# host      what a call costs the host, by layer            HOST_ARGS
# block     a whole Evoformer block beside its peers        BLOCK_ARGS
# profile   hardware counters of our kernels (ncu)          PROFILE_ARGS  (default: triangle-512), PROFILE_KERNELS
#
# LIMIT_<STAGE> in seconds changes a stage's limit. Results go to ${OUT:-build/out}: session.log, test.xml, bench.json,
# bench.png, memory.json, host.json, block.json, block.png, sanitize.log, profile.log. Set DS4SCI_COMMIT where the
# checkout has no git history.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2

out=${OUT:-build/out}
python=${PYTHON:-python3}
[[ -z ${PYTHON:-} && -x build/gpu-venv/bin/python ]] && python=$PWD/build/gpu-venv/bin/python
stages=(setup build report test sanitize bench memory host block profile)
mkdir -p "$out"
export PYTHONUNBUFFERED=1

setup() { "${PYTHON:-python3}" -m tests.benchmarks.prepare_peers install; }

build() {
    "$python" -c "from deepspeed_ds4sci.ops._extension import extension; print('built and opened:', extension())"
}

report() { "$python" -m deepspeed_ds4sci.report; }

tests() {
    local arguments=(tests -m gpu -q)
    [[ -n ${PYTEST_ARGS:-} ]] && read -ra arguments <<<"$PYTEST_ARGS"
    "$python" -m pytest "${arguments[@]}" --junitxml="$out/test.xml"
}

# The tools run side by side: each is bound by its own instrumentation and leaves the GPU idle most of the time.
sanitize() {
    local arguments=() tools=(memcheck racecheck initcheck synccheck) tool jobs=() bad=0
    local seconds=$(($(limit_of sanitize) - 15))
    read -ra arguments <<<"${SANITIZE_ARGS:-}"
    mkdir -p build/sanitize
    for tool in "${tools[@]}"; do
        local of_tool=()
        [[ $tool == initcheck ]] && of_tool=(--fill-outputs) # it does not see what the copy engine writes
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout --kill-after=5 "$seconds" \
            compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 40 \
            "$python" -m tests.benchmarks.sanitize "${of_tool[@]}" "${arguments[@]}" >"build/sanitize/$tool.log" 2>&1 &
        jobs+=($!)
    done
    : >"$out/sanitize.log"
    for tool in "${tools[@]}"; do
        wait "${jobs[0]}"
        local status=$?
        jobs=("${jobs[@]:1}")
        [[ $status == 0 ]] || bad=1
        { echo "== $tool: exit code $status"; cat "build/sanitize/$tool.log"; } >>"$out/sanitize.log"
    done
    grep -E '^== |SUMMARY|cases ran|rror|not found' "$out/sanitize.log" | cut -c1-200 | head -120
    return "$bad"
}

bench() {
    local arguments=(--graph)
    [[ -n ${BENCH_ARGS:-} ]] && read -ra arguments <<<"$BENCH_ARGS"
    "$python" -m tests.benchmarks --json "$out/bench.json" --plot "$out/bench.png" "${arguments[@]}"
}

memory() {
    local arguments=(--shapes triangle-1024)
    [[ -n ${MEMORY_ARGS:-} ]] && read -ra arguments <<<"$MEMORY_ARGS"
    "$python" -m tests.benchmarks --passes fwd+bwd --min-ms 20 --json "$out/memory.json" "${arguments[@]}"
}

host() {
    local arguments=()
    [[ -n ${HOST_ARGS:-} ]] && read -ra arguments <<<"$HOST_ARGS"
    "$python" -m tests.benchmarks.host_overhead --json "$out/host.json" "${arguments[@]}"
}

block() {
    local arguments=()
    [[ -n ${BLOCK_ARGS:-} ]] && read -ra arguments <<<"$BLOCK_ARGS"
    "$python" -m tests.benchmarks.evoformer_block --json "$out/block.json" --plot "$out/block.png" "${arguments[@]}"
}

profile() {
    local arguments=(triangle-512)
    [[ -n ${PROFILE_ARGS:-} ]] && read -ra arguments <<<"$PROFILE_ARGS"
    # The clocks are left as they are; the first run warms up and is profiled too.
    local kernels=${PROFILE_KERNELS:-"^evoformer_|^(sm90_)?prepare_kernel"}
    ncu --clock-control none -k "regex:$kernels" --section SpeedOfLight --section LaunchStats \
        --section Occupancy --section ComputeWorkloadAnalysis --section MemoryWorkloadAnalysis \
        --section WarpStateStats --section SourceCounters \
        "$python" -m tests.benchmarks.once --runs 1 "${arguments[@]}" >"$out/profile.log" 2>&1
    local status=$?
    grep -E '^  [A-Za-z_].*\(|Duration|Throughput|Registers Per|Achieved Occ|Executed Ipc Active' "$out/profile.log" | head -80
    return "$status"
}

limit_of() {
    local name="LIMIT_${1^^}"
    case $1 in
        setup) echo "${!name:-180}" ;;
        build) echo "${!name:-300}" ;;
        block) echo "${!name:-240}" ;;
        report | memory | host) echo "${!name:-120}" ;;
        *) echo "${!name:-480}" ;;
    esac
}

known() {
    local stage
    for stage in "${stages[@]}"; do [[ $stage == "$1" ]] && return 0; done
    return 1
}

if [[ ${1:-} == --stage ]]; then # one stage, in a process of its own that `timeout` can end
    [[ $2 == test ]] && set -- --stage tests
    "$2"
    exit
fi
if (($# == 0)); then
    echo "usage: gpu_session.sh STAGE..., of: ${stages[*]}" >&2
    exit 2
fi
for stage in "$@"; do
    if ! known "$stage"; then
        echo "unknown stage $stage; stages are: ${stages[*]}" >&2
        exit 2
    fi
done

summary=()
failed=0
: >"$out/session.log"
for stage in "$@"; do
    echo "=== $stage" | tee -a "$out/session.log"
    start=$SECONDS
    timeout --kill-after=20 "$(limit_of "$stage")" bash "${BASH_SOURCE[0]}" --stage "$stage" 2>&1 |
        tee -a "$out/session.log"
    status=${PIPESTATUS[0]}
    case $status in
        0) word=ok ;;
        124 | 137) word="ran out of time" ;;
        *) word="failed ($status)" ;;
    esac
    [[ $status == 0 ]] || failed=$((failed + 1))
    summary+=("$(printf '%-9s %-16s %4d s' "$stage" "$word" $((SECONDS - start)))")
done
printf '%s\n' "=== summary" "${summary[@]}" | tee -a "$out/session.log"
exit "$failed"
