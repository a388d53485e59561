"""Fine-tune any model on one's own data: what stands behind `finetune-lab sft`, `dpo` and `generate`.

For every trainer:

    recipe         settings of a run, from a YAML file and flags
    settings       one setting: kind, bounds, help; every bad value one sentence
    sources        rows to train on and to score on: a task of the course, one's own JSONL, a hub data set
    silent         the failures that raise no error: one function each
    preflight      all that can be known before training starts: data, lengths, mask, memory, warnings
    build          model, tokenizer and adapter of a recipe (full, LoRA, DoRA, QLoRA)
    runs           the folder of a run: lock, state, checkpoints that are complete or do not count
    watch          callbacks: progress bar, a function called at each step, complete checkpoints
    session        a run from its folder to its report
    resuming       repairs for a checkpoint that is loaded
    report, curves report.md, report.json, curve.png
    talk           generation with the base, the adapter and the merged model

Supervised fine-tuning: `encode` (rows -> token ids and labels, as TRL prepares them), `score`, `run` over
`trl.SFTTrainer`. Preferences: `dpo_recipe`, `pairs` (the same for pairs and thumbs), `silent_pairs`, `preflight_dpo`,
`score_pairs`, `dpo` over `trl.DPOTrainer` and `trl.KTOTrainer`.
"""
