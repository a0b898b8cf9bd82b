/* SPDX-License-Identifier: Apache-2.0 */
/* virtio-rng (virtio 1.2, section 5.4): one queue, whose buffers are filled with random bytes. */
#ifndef MEMVM_VIRTIO_RNG_H
#define MEMVM_VIRTIO_RNG_H

#include "virtio_mmio.h"

extern const struct virtio_device_ops virtio_rng_ops;

#endif
