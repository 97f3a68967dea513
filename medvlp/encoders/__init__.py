"""Image and text backbones behind one interface, and the layers between them and the losses."""
