"""The rooms of the training: what holo1_dom_finetune.py needs and is not known for.

Rooms from top to bottom; each may import those below it, and none above:

    results         results.json, the report that shows every page, the last words
    best_weights    the best weights of a run, by the metric that chooses
    evaluation      held-out pages: written, rendered, scored, kept
    recipe          what a run is made of: the facts of its recipe and its card
    final_folder    the base's tensors as training has left them: written aside, compared, renamed
    model_card      the model card, by model_card.md beside it
    publishing      the push to the Hub
    origins         which names on the Hub a local folder comes from
    memory_fit      the one decision what fits, for --plan and for training, and its proof before step one
    fp8_training    the language model's products in fp8: proved on the run's own pages, weights cast anew
    metered_trainer the HF Trainer with an exact token mean and a line a step
    treatment       what each layer does with its activations, set anew for each batch by its own size
    resuming        how a run goes on: its checkpoint, its own settings, what was typed anew
    disk_space      what a run will write, and whether the disks have room for it
    base_model      the base: its folder, its architecture, every tensor of its checkpoint
    preparation     the pages of a run: read once, checked, found by every rank
    prepared        pages that an earlier run has prepared, found again by all that decides them
    collecting      the pages of a run, from its datasets to the disk, each kept or dropped for a counted reason
    page_store      pages on their way to the disk, sealed, so that a killed reading goes on
    page_workers    pages checked by several processes, in the order of their rows
    reading         the rows of a dataset, wherever it lies
    tables          the rows of JSON Lines, JSON and CSV, a row at a time
    duplicates      which pages were there before
    page_checks     which pages can be trained on: read, cleaned, short enough, none of them twice
    page_order      which pages are trained on when
    packing         pages as one row
    fast_layers     the fast path put into a model, and vision MLPs as wide as tensor cores like
    activation_offload  activations that wait in the CPU's memory until the backward pass asks for them
    loss            the loss by the model's own way
    progress        what a run tells of itself: rates, waits, memory, the loss as a picture
    stopping        how a run is asked to stop, and when it does
    heartbeat       where each rank is, and when it hangs
    split_masters   fp32 masters under ZeRO-3 as bf16 shards and 16-bit rests, and the step on them
    zero3           all that is known of DeepSpeed's insides
    scattering      gradients of several processes under ZeRO-3, each averaged and scattered as it lies there
    memory_plan     how much memory a step takes, and which way to train is fastest among those that fit
    settings        every setting, how command line and JSON meet, what is refused
    at_hand         whether base and datasets are there, looked at before anything is loaded
    containers      what holds a dataset on a disk, and where a name in it leads
    cpu_time        how long a large model would take on a CPU, and the question before it
    training_arguments  which fields of transformers' own settings hold here, and within which bounds
    command_line    the command line, read to its end: every flag, and all that is wrong with it at once
    eight_bit       Adam's moments in 8 bits: which --optim that is, what stays in 32, what they take
    run_record      what a run was, and what of it cannot be changed
    checkpoints     checkpoints that are whole or not there; what another run finds in the output folder
    folder_lock     one owner a folder
    mixture         the datasets of a run, one or several: columns, shares, whose turn it is
    dataset         what is known of datasets, each one entry
    cleaning        what no screenshot shows goes from the HTML
    prompt_and_mask what the model is asked, and what the loss sees
    processes       who a process is, what it says, and every collective
    errors          what goes wrong, and the exit code that says so
"""
