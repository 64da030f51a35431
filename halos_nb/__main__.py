"""`python -m halos_nb`: the commands, and where the map is."""

import halos_nb

COMMANDS = f"""halos_nb {halos_nb.__version__}: align language models online, in notebooks

commands (each: --help, or --config FILE)
  python -m halos_nb.train      a policy or reward model from data (sft, dpo, kto, ...)
  python -m halos_nb.sample     prompts in, samples out
  python -m halos_nb.label      samples in, feedback out: reward model, API judge, function
  python -m halos_nb.evaluate   answers in: win rates, scores, KL, length, best-of-n
  python -m halos_nb.benchmarks RewardBench's pairs, AlpacaEval's rates, lm-eval-harness tasks
  python -m halos_nb.audit      what models really see: tokens, ends, log-probs, scores
  python -m halos_nb.plan       what each stage of a run will need: does it fit?
  accelerate launch -m ...      the same in several processes
  python -m halos_nb.submit     a notebook's run, or a sweep, as a job of SLURM; or side by side

notebooks (JupyterLab, or papermill NOTEBOOK out.ipynb -p NAME VALUE)
  nbs/online_loop.ipynb         the online loop, round after round
  nbs/reward_model.ipynb        train, judge and use a reward model
  nbs/label_by_hand.ipynb       from samples to a trained step by your own judgement
  nbs/label_round.ipynb         a person labels the round that an online loop waits with
  nbs/audit.ipynb               what models really see
  nbs/compare_runs.ipynb        runs side by side
  nbs/compare_methods.ipynb     every method, with several seeds if asked, in the playground

python
  import halos_nb               {", ".join(halos_nb.__all__)}

Begin with README.md; the map of all rooms: docs/rooms.md. Where a change goes: CONTRIBUTING.md.
First steps: make demo, make test, make lab."""

if __name__ == "__main__":
    print(COMMANDS)
