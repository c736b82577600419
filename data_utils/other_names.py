"""Know the names that other projects give to flags, for "did you mean"."""

import difflib

# {name elsewhere: names here}. A program suggests the first of them that it has.
LENGTH = ("max_seq_len", "decoder_max_seq_len", "max_len", "length")
LAYERS = ("n_layers", "encoder_layers", "decoder_n_layers", "decoder_layers", "gnn_layers")
HEADS = ("n_heads", "num_heads", "decoder_n_heads")
WIDTH = ("d_model", "hidden_size", "decoder_model_dim", "hidden")
BATCH = ("batch_size", "global_batch_size")
EVAL_BATCH = ("eval_batch_size", "val_batch_size")
WARMUP = ("warmup_steps",)
CLIP = ("grad_clip",)
EPOCHS = ("epochs",)
FOLDER = ("out", "checkpoint_dir")
DATA = ("data_dir", "dataset", "data_paths", "data", "skeleton_pool")
SAVES = ("checkpoint_interval", "save_every", "save_minutes")
RESUME = ("resume", "resume_from")
CODES = ("codebook_size", "vq_size")
RATE = ("lr",)
ELSEWHERE = dict(
    # nanoGPT, llama.c
    block_size=LENGTH,
    n_layer=LAYERS,
    n_head=HEADS,
    n_embd=WIDTH,
    max_iters=("steps",),
    num_iterations=("steps",),
    lr_decay_iters=("steps",),
    warmup_iters=WARMUP,
    min_lr=("min_lr_ratio",),
    eval_iters=("eval_windows", "eval_rows", "val_problems"),
    out_dir=FOLDER,
    always_save_checkpoint=SAVES,
    start=("prompt",),
    # transformers of Hugging Face
    per_device_train_batch_size=BATCH,
    per_device_eval_batch_size=EVAL_BATCH,
    num_train_epochs=EPOCHS,
    max_grad_norm=CLIP,
    warmup_ratio=("warmup_share", *WARMUP),
    lr_scheduler_type=("lr_scheduler", "lr_schedule"),
    logging_steps=("log_interval",),
    eval_steps=("eval_interval",),
    save_steps=SAVES,
    save_total_limit=("keep",),
    output_dir=FOLDER,
    overwrite_output_dir=("fresh",),
    resume_from_checkpoint=RESUME,
    gradient_checkpointing=("enable_gradient_checkpointing", "use_checkpointing"),
    dataloader_num_workers=("num_workers", "workers"),
    optim=("optimizer",),
    bf16=("dtype",),
    fp16=("dtype",),
    torch_compile=("compile",),
    report_to=("wandb", "wandb_mode"),
    dataset_name=DATA,
    train_file=DATA,
    max_length=("max_new_tokens", *LENGTH),
    max_seq_length=LENGTH,
    context_length=LENGTH,
    max_position_embeddings=LENGTH,
    hidden_size=WIDTH,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_return_sequences=("num_samples",),
    do_sample=("temperature",),
    max_tokens=("max_new_tokens",),
    # Lightning
    accumulate_grad_batches=("grad_accum_steps",),
    gradient_clip_val=CLIP,
    precision=("dtype",),
    accelerator=("device",),
    val_check_interval=("eval_interval",),
    log_every_n_steps=("log_interval",),
    default_root_dir=FOLDER,
    max_time=("max_seconds",),
    ckpt_path=RESUME,
    strategy=("fsdp",),
    # keras, scikit-learn
    validation_split=("val_split",),
    clipnorm=CLIP,
    units=WIDTH,
    random_state=("seed",),
    learning_rate_init=RATE,
    early_stopping_patience=("patience",),
    # TRM, HRM
    lr_warmup_steps=WARMUP,
    l_cycles=("l_steps",),
    halt_max_steps=("segments", "supervision_steps"),
    data_path=DATA,
    ema_rate=("ema_decay", "ema"),
    puzzle_emb_lr=("id_lr",),
    # PySR
    niterations=("max_seconds",),
    timeout_in_seconds=("max_seconds",),
    unary_operators=("operators",),
    binary_operators=("operators",),
    maxsize=("max_length",),
    populations=("choices",),
    population_size=("choices",),
    # autoencoders
    num_embeddings=CODES,
    n_embed=CODES,
    embedding_dim=("latent_dim", "vq_dim", *WIDTH),
    z_dim=("latent_dim",),
    commitment_cost=("beta", "vq_beta"),
    # anywhere
    bs=BATCH,
    global_batch_size=BATCH,
    train_batch_size=BATCH,
    num_epochs=EPOCHS,
    n_epochs=EPOCHS,
    num_steps=("steps",),
    train_steps=("steps",),
    num_layers=LAYERS,
    depth=LAYERS,
    embed_dim=WIDTH,
    hidden_dim=WIDTH,
    seq_len=LENGTH,
    max_lr=RATE,
    wd=("weight_decay",),
    random_seed=("seed",),
    gpu=("device",),
    amp=("dtype",),
    save_dir=FOLDER,
    checkpoint=RESUME,
)


def nearest(word, names):
    """Return the one of `names` that `word` means in another project, or that is spelt like it; "" without one."""
    for name in ELSEWHERE.get(word.replace("-", "_").lower(), ()):
        if name in names:
            return name
    return next(iter(difflib.get_close_matches(word, names, 1)), "")
