"""What tasks train on top of a pre-trained image encoder: objectives and the heads they are made of."""
