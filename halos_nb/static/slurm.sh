#!/bin/bash
# Written by `python -m halos_nb.submit`. It holds no secret: of the environment it has names only.
{% for name, value in options.items() %}
#SBATCH --{{ name }}{% if value %}={{ value | option }}{% endif +%}
{% endfor %}

cd {{ here | quote }} || exit 1
export HALOS_NB_RUNS_DIR={{ runs_dir | quote }}
# A stage gets all that the driver has, and all of its nodes: srun's own defaults are less.
export SLURM_EXPORT_ENV=ALL SLURM_OVERLAP=1 SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
unset SBATCH_EXPORT SLURM_CPU_BIND
{% if setup %}
{{ setup }}
{% endif %}

# ---- which run

script={{ script | quote }}
case "${SLURM_ARRAY_TASK_ID:-0}" in
{% for task in tasks %}
{{ loop.index0 }})
  run={{ task.run | quote }}
  notebook={{ task.executed | quote }}
  parameters=(
{% for name, value in task.parameters.items() %}
    -p {{ name | quote }} {{ value | quote }}
{% endfor %}
  )
  ;;
{% endfor %}
*) echo "no run has number $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;
esac
{% if tasks | length > 1 %}
mkdir -p "$run/submit" || exit 1
echo "$(date '+%F %T') this run's log: $run/submit/slurm-$SLURM_JOB_ID.log"
exec >>"$run/submit/slurm-$SLURM_JOB_ID.log" 2>&1
{% endif %}
echo "$(date '+%F %T') job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restart ${SLURM_RESTART_COUNT:-0}"
{% if nodes > 1 %}

# ---- every node sees the run's folder and this Python

srun --ntasks-per-node=1 --ntasks={{ nodes }} bash -c '
  for path; do
    [ -e "$path" ] || { echo "$(hostname) does not see $path: it must be on a shared file system" >&2; exit 1; }
  done' - "$script" {{ python | quote }} || exit 1
{% endif %}

# ---- the driver, on this node; its stages start on the others by themselves

driver=
told=
end() {
  told=$1
  if [ -n "$driver" ]; then kill -TERM "$driver" 2>/dev/null; fi
}
trap 'end TERM' TERM  # cancelled, preempted, or out of time
trap 'end USR1' USR1  # nearly out of time

command=({{ python | quote }} -m papermill {{ notebook | quote }} "$notebook" --no-progress-bar "${parameters[@]}")
{% if fresh %}
# What this submission has begun afresh, it goes on with when it is requeued.
if [ "$run/ledger.jsonl" -nt "$script" ]; then command+=(-p fresh False); fi
{% endif %}
"${command[@]}" &
driver=$!
if [ -n "$told" ]; then end "$told"; fi
wait "$driver"
code=$?
while kill -0 "$driver" 2>/dev/null; do
  wait "$driver"
  code=$?
done
echo "$(date '+%F %T') the driver ended with $code${told:+, told to by $told}"

if [ "$told" = USR1 ] && [ $code != 0 ]; then
  if [ "${SLURM_RESTART_COUNT:-0}" -lt {{ requeues }} ]; then
    echo "out of time: requeued, and goes on where it was"
    scontrol requeue "$SLURM_JOB_ID"
  else
    echo "out of time after {{ requeues }} restarts (slurm.requeues): not requeued; submit it again to go on" >&2
  fi
fi
exit $code
