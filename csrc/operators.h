// One line for each file FAMILY/NAME.cpp: it defines bind_NAME, which adds its functions to the Python module. Whoever
// includes this says before what OPERATOR(NAME) stands for.

OPERATOR(similarity)
OPERATOR(koleo)
OPERATOR(prototype_cross_entropy)
OPERATOR(prototype_head)
OPERATOR(sinkhorn)
OPERATOR(softmax_slope)
OPERATOR(covariance)
OPERATOR(characteristic)
OPERATOR(negative_cosine)
OPERATOR(regression)
OPERATOR(cross_entropy)
OPERATOR(augment)
OPERATOR(crop_resize)
OPERATOR(ema_update)
OPERATOR(rescale)
