/* What the node daemon and the guest say to each other. docs/formats/guest-protocol.md describes it;
 * src/hadal/node/guest/wire.py is its twin, and a test compares the numbers.
 *
 * Everything is little-endian. A frame is a header and a payload:
 *
 *     u32 length of the payload | u16 type | u16 zero | u64 command id
 *
 * A payload is raw bytes (output: u64 offset, then data; input: data) or a list of fields:
 *
 *     u16 tag | u32 length | value          (integers are u64, text is bytes without a final zero)
 */
#ifndef HADAL_PROTOCOL_H
#define HADAL_PROTOCOL_H

#define PROTOCOL_VERSION 1
#define HEADER_BYTES 16
#define FRAME_MAX (256 * 1024 + 64)   /* of a payload */
#define WINDOW (256 * 1024)           /* unacknowledged bytes, each stream and direction */
#define PATIENCE_S 5                  /* that commands wait for a daemon that has gone */
#define TAIL (16 * 1024)              /* kept of what goes beyond the limit of output */

enum frame {
    /* to the guest */
    F_HELLO = 1,      /* fields: VERSION_MIN, VERSION_MAX */
    F_EXEC = 2,       /* fields; answered by STARTED or FAILED */
    F_INPUT = 3,      /* bytes for standard input */
    F_INPUT_END = 4,
    F_RESIZE = 5,     /* fields: ROWS, COLUMNS */
    F_SIGNAL = 6,     /* fields: SIGNAL */
    F_ATTACH = 7,     /* fields: OUT_OFFSET, ERR_OFFSET: send from there on, and the exit */
    F_ACK = 8,        /* fields: OUT_OFFSET, ERR_OFFSET: kept safe up to there */
    F_FORGET = 9,     /* of an ended command: all is kept safe */
    F_LIST = 10,      /* answered by one COMMAND each, then LISTED */
    F_PING = 11,
    F_SETTLE = 12,    /* fields of "settle": who this machine is; answered by SETTLED */
    /* from the guest */
    F_WELCOME = 64,   /* fields: VERSION, BOOT_ID, LAST_ID */
    F_STARTED = 65,   /* fields: PID, TIME */
    F_FAILED = 66,    /* fields: ERRNO, TEXT: it was not run */
    F_STDOUT = 67,    /* u64 offset, data */
    F_STDERR = 68,
    F_EXIT = 69,      /* fields: STATUS, OUT_TOTAL, ERR_TOTAL, TIMED_OUT, TIME, USER_US, ... */
    F_INPUT_ACK = 70, /* fields: OFFSET: input taken up to there */
    F_COMMAND = 71,   /* fields: STATUS if it has ended */
    F_LISTED = 72,
    F_PONG = 73,
    F_ERROR = 74,     /* fields: TEXT: the connection ends */
    F_SETTLED = 75,   /* fields: ERRNO and TEXT where it failed */
};

enum tag {
    T_VERSION_MIN = 1,
    T_VERSION_MAX = 2,
    T_VERSION = 3,
    T_BOOT_ID = 4,
    T_ERRNO = 5,
    T_TEXT = 6,
    T_PID = 7,
    T_TIME = 8,       /* ns since 1970 */
    T_STATUS = 9,     /* as of wait(2) */
    T_OUT_TOTAL = 10, /* bytes written by the command */
    T_ERR_TOTAL = 11,
    T_TIMED_OUT = 12, /* TIMEOUT_* */
    T_USER_US = 13,
    T_SYSTEM_US = 14,
    T_MAX_RSS_KB = 15,
    T_OUT_OFFSET = 16,
    T_ERR_OFFSET = 17,
    T_OFFSET = 18,
    T_SIGNAL = 19,
    T_ROWS = 20,
    T_COLUMNS = 21,
    T_START_TIME = 22,
    T_LAST_ID = 23,   /* the largest id of a command so far */
    T_NONCE = 24,     /* of HELLO, and of the WELCOME that answers it */
    T_OOM_KILLS = 25, /* processes that this kernel killed while the command ran */
    /* EXEC */
    T_ARGUMENT = 32,
    T_ENVIRONMENT = 33, /* NAME=value */
    T_DIRECTORY = 34,
    T_USER = 35,        /* name, uid, name:group or uid:gid */
    T_TTY = 36,
    T_INPUT = 37,       /* 1: a pipe; else /dev/null */
    T_TIMEOUT_MS = 38,
    T_QUIET_MS = 39,    /* without output */
    T_OUTPUT_LIMIT = 40,/* bytes, each stream; 0: none */
    T_APPLET = 41,      /* 1: the first argument names one of ours, run without the image */
    T_NOFILE = 42,
    T_KEPT = 43,        /* 1: with the descriptor that the box was made with, as number 4 */
    /* launch request */
    T_REQUEST = 64,
    T_HOSTNAME = 65,
    T_LOWER = 66,       /* directory of a layer, the top one first */
    T_SCRATCH = 67,     /* directory that holds upper/ and work/ */
    T_SCRATCH_BYTES = 68, /* instead: a tmpfs of this size; or a mount, sent along as a descriptor */
    T_SCRATCH_INODES = 69,
    T_RUN_DIRECTORY = 70, /* of the box, on the host */
    T_SOCKET = 71,      /* path on which the guest listens */
    T_UID_BASE = 72,    /* absent: no user namespace */
    T_UID_COUNT = 73,
    T_CGROUP = 74,      /* path of a cgroup.procs to join */
    T_NETNS = 75,       /* path of a network namespace; absent: a new one */
    T_SHM_BYTES = 76,
    T_FILE = 77,        /* name in /etc, zero byte, content */
    T_BIND = 78,        /* source, zero byte, target, zero byte, "ro" or "rw" */
    T_VOLATILE = 79,
    T_RLIMIT = 81,      /* "name=soft:hard" */
    T_TMPFS = 82,       /* target, zero byte, bytes as text */
    T_READ_ONLY = 83,
    T_KEEP = 85,        /* so many of the descriptors sent along, the last ones, are for commands: see T_KEPT */
    T_DEVICE = 86,      /* "kvm" or "net/tun": a device that its users may open, too */
    T_LEASE_S = 84,     /* without a node daemon for so long, the box ends itself */
    /* launch reply */
    T_PHASE = 96,
    T_ELAPSED_US = 97,
    T_EVENT = 98,       /* EVENT_* */
    /* settle: HOSTNAME, FILE, TIME, and */
    T_SEED = 112,     /* random bytes */
    T_HELD = 113,     /* 1: no command runs on; 0: they do */
    T_ADJUST = 115,   /* ns that its clock is put forward by, as a signed number */
    T_NETWORK = 114,  /* text: own address, gateway, hardware address of each, MTU */
    /* applets */
    T_PATH = 128,
    T_MODE = 130,
    T_SIZE = 131,
    T_MTIME = 132,
    T_CTIME = 133,
    T_UID = 134,
    T_GID = 135,
    T_KIND = 136,       /* S_IFMT bits */
    T_COOKIE = 139,
    T_MASK = 140,
    T_LINK_TARGET = 141,
    T_LENGTH = 149,
};

/* Through a port of a virtual machine, which has no beginning and no end of connections, these two bytes
 * and no others are escaped: PORT_BEGIN goes before HELLO and before WELCOME, and what has not become a
 * whole frame by then is dropped. PORT_ESCAPE goes before a byte that is sent with PORT_FLIP. */
enum { PORT_BEGIN = 0x7e, PORT_ESCAPE = 0x7d, PORT_FLIP = 0x20 };
enum { TIMEOUT_NONE = 0, TIMEOUT_LIFE = 1, TIMEOUT_QUIET = 2 };
enum { EVENT_CLONED = 1, EVENT_READY = 2, EVENT_FAILED = 3, EVENT_EXITED = 4 };

#endif
