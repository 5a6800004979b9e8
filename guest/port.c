/* A connection through a port of a virtual machine: a line of bytes on which nobody sees where one
 * connection ends and the next begins. protocol.h says how that is told. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "guest.h"

#define CHUNK (64 * 1024)

struct port {
    bool begun, escaped; /* of what comes in */
    struct bytes out;    /* escaped; of it some has gone out */
};

static const uint8_t beginning = PORT_BEGIN;

ssize_t read_port(struct connection *c)
{
    static uint8_t raw[CHUNK];
    ssize_t n = read(c->source.fd, raw, sizeof raw);
    bytes_reserve(&c->in, n > 0 ? (size_t)n : 0);
    for (ssize_t i = 0; i < n; i++) {
        if (raw[i] == PORT_BEGIN) {
            handle_frames();
            bytes_drop(&c->in, c->in.length); /* what its sender did not end */
            bytes_reserve(&c->in, (size_t)(n - i));
            c->port->begun = true;
            c->port->escaped = false;
        } else if (!c->port->begun) {
            continue;
        } else if (raw[i] == PORT_ESCAPE) {
            c->port->escaped = true;
        } else {
            c->in.data[c->in.length++] = c->port->escaped ? raw[i] ^ PORT_FLIP : raw[i];
            c->port->escaped = false;
        }
    }
    return n;
}

void begin_port(struct connection *c)
{
    bytes_free(&c->port->out);
    bytes_add(&c->port->out, &beginning, 1);
}

static void escape(struct port *port, const uint8_t *data, size_t length)
{
    bytes_reserve(&port->out, 2 * length);
    uint8_t *to = port->out.data + port->out.length;
    for (size_t i = 0; i < length; i++) {
        bool special = data[i] == PORT_BEGIN || data[i] == PORT_ESCAPE;
        if (special)
            *to++ = PORT_ESCAPE;
        *to++ = special ? data[i] ^ PORT_FLIP : data[i];
    }
    port->out.length = (size_t)(to - port->out.data);
}

bool port_output_left(const struct port *port)
{
    return port->out.length > 0;
}

bool flush_port(struct connection *c)
{
    struct port *port = c->port;
    while (port->out.length || c->out.length) {
        if (port->out.length < CHUNK && c->out.length) {
            size_t part = c->out.length < CHUNK ? c->out.length : CHUNK;
            escape(port, c->out.data, part);
            bytes_drop(&c->out, part);
        }
        ssize_t n = write(c->source.fd, port->out.data, port->out.length);
        if (n <= 0)
            return false; /* it takes no more, or nobody is at its other end: that is seen when reading */
        bytes_drop(&port->out, (size_t)n);
    }
    return true;
}

void serve_port(int fd, int oom_score, uint64_t lease_ns)
{
    static struct port port;
    bytes_kept = 1024 * 1024; /* whole frames: in emulation new pages for each take 40 % of the time of a file on its way out */
    guest.listening.fd = -1;
    guest.connection = (struct connection){.source = {.kind = S_CONNECTION, .fd = fd}, .port = &port};
    serve(oom_score, 0, lease_ns);
}
