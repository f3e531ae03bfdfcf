# Where the paper differs from the published script: put it behind the other, config/ntp.py config/ntp_paper.py
batch_size = 256
