#!/usr/bin/env bash
# A CUDA 13.0 compiler without a toolkit, a GPU or root: nvcc from NVIDIA's wheels on PyPI, and what else a build needs.
#   scripts/cuda-toolkit.sh DIR && . DIR/env.sh && cargo build --release --features cuda
# Takes 300 MB. docs/cuda.md says what the program then needs where it runs.
set -euo pipefail

if [ $# -ne 1 ]; then
    sed -n '2,4s/^# //p' "$0" >&2
    exit 2
fi
dir=$(realpath -m "$1")
wheels=(nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.88 nvidia-cuda-cccl==13.0.85)

mkdir -p "$dir/bin"
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-deps --no-compile --target "$dir/wheels" "${wheels[@]}"
home=$dir/wheels/nvidia/cu13

# The linker wants the driver's and the toolkit's libraries by name. Empty ones do: the program opens the real ones when it runs.
mkdir -p "$home/lib/stubs"
for library in cuda.so.1 nvrtc.so.13 curand.so.10 cublas.so.13 cublasLt.so.13; do
    gcc -shared -nostdlib -x c /dev/null -Wl,-soname,"lib$library" -o "$home/lib/stubs/lib${library%%.*}.so"
done
ln -sf ../libcudart_static.a "$home/lib/stubs/libcudart.a"

# candle-kernels compiles its kernels for quantized and mixture-of-experts matrices into a library, most of its minutes. Nothing
# here reaches them. This nvcc gives such a request an empty object and passes all others on.
cat > "$dir/bin/nvcc" <<'W'
#!/usr/bin/env bash
output=
object=
previous=
for word in "$@"; do
    case $previous in -o) output=$word ;; esac
    case $word in -c) object=1 ;; esac
    previous=$word
done
if [ -n "$object" ]; then
    exec gcc -c -x c /dev/null -o "$output"
fi
exec "$CUDA_HOME/bin/nvcc" "$@"
W
chmod +x "$dir/bin/nvcc"

# RUSTFLAGS: cudarc opens the libraries at run time. They must not reach build scripts, hence the target.
cat > "$dir/env.sh" <<END
export CUDA_HOME="$home"
export PATH="$dir/bin:\$CUDA_HOME/bin:\$PATH"
export CUDA_COMPUTE_CAP="\${CUDA_COMPUTE_CAP:-90}"
export CARGO_BUILD_TARGET=x86_64-unknown-linux-gnu
export RUSTFLAGS='--cfg feature="dynamic-loading"'
END
echo "done; now: . $dir/env.sh"
