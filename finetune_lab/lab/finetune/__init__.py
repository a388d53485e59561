"""Fine-tune any model on one's own data: what stands behind `finetune-lab sft` and `finetune-lab generate`.

    recipe       settings of a run, from a YAML file and flags, every bad value one sentence
    sources      rows to train on and to score on: a task of the course, one's own JSONL, a hub data set
    encode       rows -> token ids and labels, as TRL prepares them; the mask made visible
    silent       the failures that raise no error: one function each
    preflight    all that can be known before training starts: data, lengths, mask, memory, warnings
    build        model, tokenizer and adapter of a recipe (full, LoRA, DoRA, QLoRA)
    runs         the folder of a run: lock, state, checkpoints that are complete or do not count
    watch        callbacks: progress bar, a function called at each step, complete checkpoints
    session      a run from its folder to its report, for any trainer
    run          supervised fine-tuning: `session` over `trl.SFTTrainer`
    score        exact match and held-out loss, before and after
    report       report.md, report.json, curve.png
    talk         generation with the base, the adapter and the merged model

Only `run`, `preflight.inspect`, `encode` and `SftRecipe` know about supervised fine-tuning; the rest serves any trainer.
"""
