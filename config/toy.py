# The whole pipeline in about 10 minutes on 2 CPU cores: all defaults of pipeline.py.
out = "out/toy"
configs = "config/toy"
