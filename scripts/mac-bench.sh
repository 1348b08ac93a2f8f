#!/usr/bin/env bash
# On a Mac: tests of the Metal kernels and benches against MLX, written to one report that you can attach to an issue.
#   scripts/mac-bench.sh [report.md]
# MLX is measured where `python3 -c 'import mlx.core'` works (pip install mlx). Nothing is sent anywhere.
set -uo pipefail
cd "$(dirname "$0")/.."
report=${1:-mac-report.md}
if [ "$(uname -s)" != Darwin ]; then
    echo "This runs on a Mac; elsewhere: cargo bench --bench mlx_comparison" >&2
    exit 1
fi

section() { # TITLE COMMAND...: the command and the end of its output
    local title=$1 status=0
    shift
    echo "$title ..." >&2
    printf '\n## %s\n\n`%s`\n\n```\n' "$title" "$*"
    "$@" > "$log" 2>&1 || status=$?
    tail -n 80 "$log"
    printf '```\n\nstatus %s\n' "$status"
    [ "$status" = 0 ] || failed=1
}

log=$(mktemp)
trap 'rm -f "$log"' EXIT
failed=0
{
    printf '# Metal report\n\n'
    echo "- commit: $(git rev-parse HEAD 2> /dev/null || echo unknown)$(git diff --quiet HEAD 2> /dev/null || echo ', changed')"
    echo "- date: $(date -u +%Y-%m-%d)"
    echo "- macOS: $(sw_vers -productVersion), $(uname -m)"
    echo "- chip: $(sysctl -n machdep.cpu.brand_string), $(($(sysctl -n hw.memsize) >> 30)) GiB"
    echo "- GPU: $(system_profiler SPDisplaysDataType 2> /dev/null | grep -E 'Chipset|Cores|Metal' | sed 's/^ *//' | paste -sd';' -)"
    echo "- Rust: $(rustc --version)"
    section "Kernels on the GPU" cargo test --locked --release --test metal_device -- --nocapture
    section "The decoder's ops on the GPU" env METAL_CANDLE_TEST_DEVICE=metal cargo test --locked --release --test decoder_ops --test quantized
    section "The op, with fallbacks forbidden" env METAL_CANDLE_STRICT=1 \
        cargo test --locked --release --test custom_ops_correctness test_fused_lora_correctness -- --nocapture
    section "Fused and unfused" cargo bench --locked --bench mlx_comparison -- --output-format bencher
    if python3 -c 'import mlx.core' 2> /dev/null; then
        section "MLX" python3 benches/mlx_baseline.py
    else
        printf '\n## MLX\n\nNot measured: there is no MLX here (pip install mlx).\n'
    fi
} > "$report"
echo "written to $report" >&2
exit "$failed"
