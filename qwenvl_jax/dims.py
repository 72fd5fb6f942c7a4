"""The legend of dimension letters. A suffix on a local variable spells its shape: `x_BTH` is [batch, tokens, hidden].

| letter | dimension                                                                |
| ------ | ------------------------------------------------------------------------ |
| B      | rows of a batch                                                          |
| T      | token slots in a row                                                     |
| S      | slots in a key/value cache                                               |
| A      | position axes (time, height, width)                                      |
| H      | width of the decoder                                                     |
| D      | width of the vision tower, and of a flattened patch where it stands last |
| F      | width of a feed-forward layer                                            |
| N, K   | query heads, key/value heads                                             |
| E      | width of one head                                                        |
| V      | vocabulary                                                               |
| X      | experts of a layer                                                       |
| Y      | layers in a stack                                                        |
| G      | vision groups (sharded as the batch)                                     |
| R, L   | vision rows in a group, patch slots in a vision row                      |
| M      | merged vision tokens in a group                                          |
| P      | side of a patch, in pixels                                               |
| Q      | merged tokens that a pooled token is made of, at most                    |
"""
