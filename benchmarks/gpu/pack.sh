# Fills .carry with what benchmarks/gpu/puppets.sh and student.sh need on a machine that reaches nothing: about 62 MB, so leave the
# shipped model.safetensors, docs and tests out of what travels beside it where that is limited to 64 MiB.
#   bash benchmarks/gpu/pack.sh h200 PYTHON       PYTHON: of the device's version, with its jax, mi_jax's needs and a CUDA plug-in
set -eu
KIND=$1 PYTHON=$2
mkdir -p .carry
scratch=$(mktemp -d)
"$PYTHON" -m pip download -q --no-deps --only-binary=:all: -d "$scratch/wheels" \
  flax==0.12.12 grain==0.2.18 array-record==0.8.6 portpicker==1.6.0 soxr==1.1.0 espeakng-loader==0.2.4 \
  tyro==1.0.17 docstring-parser==0.18.0 typeguard==4.6.1 tensorboardX==2.6.5
for wheel in "$scratch"/wheels/*.whl; do "$PYTHON" -m zipfile -e "$wheel" "$scratch/site"; done
tar -C "$scratch/site" -cf - . | xz -9 > .carry/site.tar.xz
xz -6 -c mi_jax/assets/puppet-teacher/model.safetensors > .carry/model.safetensors.xz
JAX_PLATFORMS=cpu "$PYTHON" benchmarks/gpu/puppets.py --compile-for "$KIND" --programs .carry/programs --only vae encode
rm -r "$scratch"; du -sh .carry
