/* SPDX-License-Identifier: Apache-2.0 */
#include "lock.h"

__thread uint32_t lock_thread_id;
