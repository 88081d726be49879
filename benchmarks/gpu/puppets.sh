# The puppets' minutes, on a machine with a GPU that holds this repository and, in .carry, what benchmarks/gpu/pack.sh
# left there: the Python packages that it lacks, programs compiled ahead, weights.
#   FIRST=595 bash benchmarks/gpu/puppets.sh OUT begin ARGUMENTS   begins, and comes back after FIRST seconds
#   LAST=170 bash benchmarks/gpu/puppets.sh OUT end                 waits for the end, at most LAST seconds
# Both leave in OUT the log and the newest weights, in pieces of 15 MiB.
OUT=$1 PART=$2; shift 2
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD/.run/site
mkdir -p .run/out .clips
if [ $PART = begin ]; then
  python3 - <<'PYTHON'
import lzma, os, tarfile
tarfile.open(".carry/site.tar.xz").extractall(".run/site", filter="data")
if os.path.exists(".carry/model.safetensors.xz"):
    with lzma.open(".carry/model.safetensors.xz") as packed, open("mi_jax/assets/puppet-teacher/model.safetensors", "wb") as f:
        f.write(packed.read())
PYTHON
  setsid nohup nice -n 10 python3 benchmarks/gpu/draw.py .clips --workers 13 --count ${COUNT:-9000} > .run/draw.log 2>&1 &
  run="python3 benchmarks/gpu/puppets.py --clips .clips --out .run/out --count ${COUNT:-9000} $*"
  setsid nohup bash -c "$run --programs .carry/programs || $run; touch .run/done" > .run/run.log 2>&1 &
  python3 benchmarks/gpu/attention.py $OUT/attention.json > .run/attention.log 2>&1 &
fi
limit=$([ $PART = begin ] && echo $FIRST || echo $LAST)
while [ $SECONDS -lt $limit ] && [ ! -e .run/done ]; do sleep 0.5; done
if [ ! -e .run/done ] && [ -e .run/out/vae.npz ]; then  # the newest weights, not those of the last two minutes
  touch .run/out/save
  for _ in $(seq 30); do [ -e .run/out/save ] && sleep 0.5; done
fi
for file in vae dit; do [ -e .run/out/$file.npz ] && split -b 15M -d .run/out/$file.npz $OUT/$file.npz. ; done
cp .run/out/log.json .run/out/vae.png $OUT/
ls -la $OUT
grep -v "^[WI][0-9]\|Warning" .run/run.log | cut -c1-420 | tail -${LINES_SHOWN:-70}
cat .run/attention.log 2>/dev/null | grep -v Warn | cut -c1-300 | tail -20; tail -2 .run/draw.log
