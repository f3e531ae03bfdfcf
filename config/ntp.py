# NTP with the settings of the published training script, which are the defaults but for this.
val_split = "dirichlet"
