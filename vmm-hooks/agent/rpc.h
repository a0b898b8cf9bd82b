/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The agent's end of the connection to memd: messages on the socket, entries in the ring. Belongs
 * to the scanner's thread. Nothing here waits, except rpc_greet for its answer.
 */
#ifndef MEMD_AGENT_RPC_H
#define MEMD_AGENT_RPC_H

#include "protocol.h"

#define RPC_MAX_MESSAGE 1024U

struct rpc {
    int fd;
    struct ring *ring;
    uint32_t head;   /* to_memd */
    uint32_t tail;   /* to_agent */
    uint32_t buffer; /* the next page buffer */
    bool dirty;      /* entries were written since the last doorbell */
};

union rpc_message {
    struct message_header header;
    struct message_welcome welcome;
    struct message_words words;
    struct message_segment segment;
    struct message_tune tune;
    struct message_mover mover;
    uint8_t bytes[RPC_MAX_MESSAGE];
};

/*
 * Connects to `path`, says hello, and reads the answer (waiting at most 5 s). 0: *ret_welcome is
 * the answer, the ring is mapped, *ret_dev is a descriptor of /dev/userfaultfd or -1. -EACCES: memd
 * refused, its words are in `reason` (PROTOCOL_TEXT_BYTES). Other -errno: not reachable, or it
 * speaks something else.
 */
int rpc_greet(struct rpc *rpc, const char *path, const struct message_hello *hello,
              struct message_welcome *ret_welcome, int *ret_dev, char *reason);

/* Closes the connection; rpc->fd becomes -1. */
void rpc_close(struct rpc *rpc);

/* Sends one message, with a descriptor or -1. 0 or -errno. */
int rpc_send(struct rpc *rpc, const void *message, uint32_t bytes, int fd);

/* The next message, if there is one: 1 (and a descriptor or -1), 0 none, -errno the connection is
 * over. The header's size has been checked against what came. */
int rpc_receive(struct rpc *rpc, union rpc_message *ret_message, int *ret_fd);

/* Puts an entry into the ring. False: no room now. */
bool rpc_put(struct rpc *rpc, uint32_t op, uint32_t page, uint64_t arg);
/* Room for that many entries? */
bool rpc_room(const struct rpc *rpc, uint32_t entries);
/* A page buffer that is ours, its number in *ret_buffer, or NULL when all are memd's now. It is
 * used by the next rpc_put(RING_PAGE). */
uint8_t *rpc_page_buffer(struct rpc *rpc, uint32_t *ret_buffer);
/* The next entry from memd, if there is one. */
bool rpc_take(struct rpc *rpc, struct ring_entry *ret_entry);
/* Rings if anything was put since the last time. */
void rpc_ring(struct rpc *rpc);

#endif
