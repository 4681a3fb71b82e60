"""Every bound of the mirror in one place, each with the reason for its value."""

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

# The unit of the dirty map: the page of the host's cache and the block of most filesystems.
BLOCK_BYTES = 4 * KIB
# The unit of the activity log: 1 024 blocks; large enough that 1 024 hot extents cover 4 GiB of working set, small
# enough that reading them back after a crash takes seconds.
EXTENT_BYTES = 4 * MIB
BLOCKS_PER_EXTENT = EXTENT_BYTES // BLOCK_BYTES

# An on-disk record: what any disk writes without touching its neighbours; torn ones are found by their checksum.
RECORD_BYTES = 4 * KIB

# Former generations kept to recognise a peer that is far behind; DRBD keeps two, split-brain analysis gains from more.
HISTORY_MAX = 16

# A volume's name is part of export names and file names.
NAME_MAX_CHARACTERS = 63

# The largest request that travels in one message; nbdkit itself accepts at most 64 MiB from a client.
REQUEST_BYTES_MAX = 64 * MIB
# Trims and zeroes may span gigabytes: they go in pieces, so that none needs more extents than the log holds
# (invariant log-never-deadlocks).
PIECE_BYTES_MAX = 64 * MIB

# Hot extents by default (4 GiB): bounds what is compared after a crash.
LOG_SLOTS_DEFAULT = 1024
# Fewer could not hold the largest request twice; more would not be rebuilt from one ring.
LOG_SLOTS_MIN = 64
LOG_SLOTS_MAX = 8192
# Extents that are logged ahead of a sequential writer (32 MiB): a durable record takes 0.1 to 1 ms, in which a quick
# disk writes a few MiB; of a small log at most a quarter.
LOG_AHEAD_EXTENTS = 8
# Slots that one log record changes: fifteen requests of the largest size (17 extents each) share one durable write.
LOG_CHANGES_MAX = 256
# The ring of log records and the slice of unchanged slots in each: the ring less its newest record, which may be torn,
# still names every slot of the largest log (63 x 160 >= 8192), and 256 KiB are read in a moment at start.
LOG_RING_RECORDS = 64
LOG_SLICE = 160

# Extents whose bitmaps (128 bytes each) one record of the dirty map holds, beside its header and checksum.
EXTENTS_PER_PAGE = 31
# Extents of which one record of DIR/unproven holds a bit each, beside its header and checksum (125 GiB of volume).
EXTENTS_PER_UNPROVEN_PAGE = 32000

# A note in the superblock (on the last resync, on the last verify): some short values as JSON.
NOTE_BYTES_MAX = 512

# Parts of suspect blocks that a replica was given while alone: 12 bytes each in the superblock. They are as rare as
# suspects are, and none is longer than a block.
SUSPECT_PARTS_MAX = 128

# How long a request waits for a flush to free slots of the log before extents give way with their dirty bits durable
# instead: longer than a flush of what cold writes bring (2 to 5 ms), short beside what a client would call a stall.
LOG_ROOM_WAIT_S = 0.01
# Extents that give way so at a time: some dozen pages of the map, written together.
LEFT_DIRTY_EXTENTS_MAX = 64
# So many flushes in a row after a few writes each are a habit (mirror.core.commits).
COMMITS_MIN = 3
# So many in a row of as many writes each, that the flush of the next one is sent with its last write: beside a disk of
# milliseconds a wrong guess costs a commit a fifth, a right one saves a round trip.
COMMITS_ALIKE_MIN = 8
# A flush of so much or more goes to the disk in pieces, with so much of it on its way: 5 ms and 3 ms of a quick disk.
EVEN_FLUSH_BYTES = 8 * MIB
WRITE_BACK_WINDOW_BYTES = 4 * MIB

# Zeroes are written in pieces of this size where the file can't make holes: large enough that system calls don't count.
ZERO_PIECE_BYTES = 1 * MIB
# Descriptions of the data file for durable writes, one for each that runs: as many as nbdkit has worker threads a
# connection; what comes beyond them writes, then flushes.
DURABLE_DESCRIPTORS = 16
# Metadata is read and written in pieces of this size: 256 records a system call, small in memory.
METADATA_PIECE_BYTES = 1 * MIB
# Answers to one question about holes; a badly fragmented file is described piece by piece, never in one endless list.
EXTENTS_ANSWER_MAX = 4096

# Data streams of one session. As many as nbdkit has worker threads a connection, so hardly any waits for a stream.
DATA_STREAMS = 16
# The largest write that a peer parks until the record of its extents is durable: a database's page, or a few of them.
PARKED_BYTES_MAX = 32 * KIB
# Parked writes at a time: as many as requests.
PARKED_MAX = 16
# Of those that wait for their record so many keep a stream meanwhile, and are not sent together with others. Fewer than
# there are streams: who makes room in the log for them needs one for his flush, beside one that has a flush ahead.
PARKED_ON_STREAMS_MAX = 2
# Streams for resync: while one chunk is applied or compared the next one is on the way. More threads only pass the
# interpreter's lock around (1 GiB on two cores: 264 to 347 MB/s with two, 214 to 376 with four).
SYNC_STREAMS = 2
# Microseconds that either end looks for the next message before it sleeps, while one write is in flight. A round trip
# and the peer's write take 15 to 30, a client's next write comes 15 to 60 after the last one's answer; on a machine on
# which waking a sleeper takes 35 (a guest on an AMD EPYC), 30 to 80 and 90 to 150.
SPIN_US_MAX = 400
# Unanswered writes under protocol A (the bounded send queue of invariant ack-c).
IN_FLIGHT_COUNT_MAX = 1024
IN_FLIGHT_BYTES_MAX = 32 * MIB

# A control message is a few hundred bytes of JSON, the list of dirty extents of a large volume the exception.
CONTROL_BYTES_MAX = 8 * MIB

# The first message on a connection: a handshake's is about 2 KiB. A stranger gets no more memory than that.
HELLO_BYTES_MAX = 32 * KIB
# What the peer says to people (a reason, a remedy) goes into logs and the status as far as this.
WORDS_CHARACTERS_MAX = 1000

# Path of a unix socket: sockaddr_un holds 108 bytes with the closing zero.
UNIX_PATH_BYTES_MAX = 107

# Changes that a sender thread of protocol A sends before it waits for their answers.
SEND_BATCH_COUNT_MAX = 64

# Read errors of its own disk that a primary answers from the peer before the disk counts as Failed.
READ_ERRORS_MAX = 16

# A client that attaches while another one holds the volume: a client that is just leaving is drained well within it.
ATTACH_WAIT_S = 1.0
# A client that comes before the start has decided the role: longer than the default wait for a peer, shorter than what
# clients take for a dead server.
START_WAIT_S = 10.0
# The largest request that is advertised to clients: what the kernel's and qemu's clients send at most.
ADVERTISED_REQUEST_BYTES_MAX = 32 * MIB

# Extents that a sync target lists in its handshake; more are summed up as "all", which costs reading, not sending.
MAP_EXTENTS_SENT_MAX = 16384

# The header of a message between replicas (wire.py asserts it): a message without payload is one short frame.
HEADER_BYTES = 60
# The largest ZMTP frame: the largest request and its header. What a stranger announces beyond it is refused unread.
FRAME_BYTES_MAX = HEADER_BYTES + REQUEST_BYTES_MAX
# ZMTP commands carry a socket type, an identity (255 bytes at most) or a heartbeat.
COMMAND_BYTES_MAX = 1 * KIB

# What a resync compares and copies under one range lock: long enough to fill a link, short enough (a few
# milliseconds) for a foreground write to wait for.
RESYNC_CHUNK_BYTES = 1 * MIB
# The same when it is held back for the foreground most: an eighth of the stall, and half the speed of one stream.
RESYNC_HELD_CHUNK_BYTES = 128 * KIB
# What a dirty run counts as at least in a chunk of many: its message and system calls take so long.
# So up to 64 scattered blocks share their messages, or 8 of them beside clients.
RESYNC_RUN_BYTES = 16 * KIB
# What a resync compares in any case before it may leave that out: three whole chunks, which takes some milliseconds. A
# few scattered blocks say nothing of what comes.
RESYNC_EVIDENCE_BYTES = 2 * MIB
# A resync flushes both replicas after so much, so that an interruption costs no more, and write-back keeps pace
# (1 GiB: 346 to 402 MB/s; with 256 MiB 264 to 347).
RESYNC_STABLE_BYTES = 64 * MIB

# A plan that failed (a resync that stopped, a handshake that broke off) is tried again after this, then twice as late
# each time: soon enough for what mends itself, rare enough to cost nothing while a disk stays full over night.
PLAN_RETRY_FIRST_S = 1.0
# The longest wait: whoever made room or mended a disk sees the replicas find together within about a minute.
PLAN_RETRY_MAX_S = 60.0

# Runs of blocks that `diff` lists unless told otherwise; the totals count all of them. An answer of the control socket
# holds ten times as many.
DIFF_RUNS_DEFAULT = 1000
DIFF_RUNS_MAX = 20_000

# Suspect or differing ranges that a status or an answer lists; the rest is counted.
RANGES_SHOWN_MAX = 32
# A proof after a handshake compares so much a second: the default log of 4 GiB takes a minute, and a twentieth of a
# core on either side (reading and hashing 1 MiB takes 0.8 ms).
PROOF_BYTES_PER_S = 64 * MIB
# The rest of the volume, in the background: about a hundredth of a core and of a disk; a TiB takes 18 hours.
PROOF_REST_BYTES_PER_S = 16 * MIB
# How often a running verify notes durably how far it is, and a proof which extents it has compared: what an
# interruption costs to compare again, against two durable writes.
VERIFY_NOTE_INTERVAL_S = 5.0
# After an accept that the system refused (no descriptor) whoever comes waits so long for the next one.
ACCEPT_PAUSE_S = 0.1

# A peer that is not heard of for so long is silent, well before it counts as lost: heartbeats come several times in it.
SILENT_S = 0.5
