# The published reconstruction loss: put it behind the other settings of any stage that has a reconstructor.
# Unless the reconstructor's file holds the two networks, they come from the hub (Apache-2.0, 0.7 GB).
loss_type = "l1+dinov2_reg+siglip2"
loss_weights = "1+0.3+0.3"
