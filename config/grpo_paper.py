# Where the paper differs from the published script: put it behind the other, config/grpo.py config/grpo_paper.py
epochs = 3
batch_size = 256
requirement = "fixed"   # task_loss_requirement, 0.7
temperature = 1.0
temperature_end = 0.01
