# The puppets' student of four steps in LIMIT seconds, all included: records are drawn and encoded, student and critic
# trained until the time is up, the student's factors written. Works wherever mi_jax is; on a machine that lacks packages
# it takes them from .carry, where benchmarks/gpu/pack.sh put them.
#   LIMIT=560 bash benchmarks/gpu/student.sh OUT [options of mi-jax train]
#     CLIPS, DUETS: how many are drawn; CONFIG, BASE: what is trained, and the teacher; RUN: a folder to work in
# OUT/four-steps.safetensors are the factors, OUT/train.log the run's. A RUN that is there is gone on with.
set -eu
OUT=$1; shift
BASE=${BASE:-puppet-teacher} CONFIG=${CONFIG:-configs/puppet_dmd2.py} RUN=${RUN:-.run} LIMIT=${LIMIT:-560}
mkdir -p "$RUN" "$OUT"
if [ -e .carry/site.tar.xz ] && [ ! -e "$RUN/site" ]; then
  python3 -c 'import sys, tarfile; tarfile.open(".carry/site.tar.xz").extractall(sys.argv[1], filter="data")' "$RUN/site"
fi
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD:$RUN/site${PYTHONPATH:+:$PYTHONPATH}
if [ ! -e "$RUN/records/index.json" ]; then
  python3 -m mi_jax prepare --puppets ${CLIPS:-3000} --duets ${DUETS:-300} --seconds 5.24 --model "$BASE" \
    --out "$RUN/records" > "$OUT/prepare.log" 2>&1
fi
echo "records after $SECONDS s"
# Room for the last checkpoint and the export; the run ends itself, whole, when it is asked to.
left=$((LIMIT - SECONDS - ${ROOM:-30}))
[ $left -gt 0 ] || { echo "no time is left to train: LIMIT is $LIMIT s" >&2; exit 1; }
timeout -s TERM $left python3 -m mi_jax train "$CONFIG" --objective.records "$RUN/records" \
  --objective.teacher "$BASE" --objective.sample-vae None --out "$RUN/student" "$@" > "$OUT/train.log" 2>&1 || [ $? -eq 124 ]
echo "trained after $SECONDS s"
python3 -m mi_jax export "$RUN/student" "$OUT/four-steps.safetensors" --overwrite
tr '\r' '\n' < "$OUT/train.log" | tail -n 3; ls -la "$OUT"
