# Generated clips for the toy run.
n_train = 4000
