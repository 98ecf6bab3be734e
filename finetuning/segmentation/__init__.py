"""From image features and prompts to masks.

automatic: find all objects of an image without a prompt
averaging: average the masks of several views of an image
clean_masks: drop small parts of a mask and fill small holes
drawing: draw masks and prompts on an image
features: what the image encoder computes of images
predicting: from features and prompts to masks and scores: the one path
prompts: points and boxes, and clicks that correct a mask
views: an image turned and mirrored, with its masks and prompts
"""
