# The whole pipeline in about 9 minutes on 2 CPU cores: all defaults of pipeline.py.
out = "out/toy"
configs = "config/toy"
