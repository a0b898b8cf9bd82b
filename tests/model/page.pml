/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The life of one page while its guest moves (memd/postcopy/agent/incoming.h, outgoing.h), after the
 * final map: missing, requested, placed, removed; fault, push, discard, retry, cut. The processes
 * below are the threads that have to do with it, in steps as small as another thread can come
 * between.
 *
 * What must hold:
 *   - who reads the page sees the source's bytes until it is given up, and zeros for ever after
 *     (the assertion in `guest`);
 *   - nobody waits for ever, and the page leaves `remote`: a guest, or the proof, that still waits
 *     when nothing more can happen is an invalid end state, which the verifier reports;
 *   - a page that is copied under the guest was missing (the assertion in place()).
 *
 * Each of NO_LOCK, NO_LOOK, NO_WAKE, NO_HAVE and NO_HOLD takes one means away; each must be found out
 * (tests/model/run tries them all).
 */

#define MISSING 0
#define BYTES   1
#define ZEROS   2

#ifndef CUTS
#define CUTS 1
#endif

/* Reads of the first guest. */
#ifndef READS
#define READS 1
#endif

mtype = { remote, private, absent };
mtype = { WANT, HAVE, HAVE_NOT };

/* The destination's page: what is under the guest, what the table says. */
byte page = MISSING;
mtype table = remote;
bool requested = false;
bool locked = false;
bool removed = false; /* it was given up: known to nobody but the assertion */

/* Guests in a fault, and what the kernel has told the handler of them. */
bool waiting[2];
byte faults = 0;

/* The connections, of which a cut leaves nothing; `epoch` counts them. */
chan to_source = [4] of { mtype };
chan urgent = [3] of { bit };
chan bulk = [3] of { bit };
byte epoch = 1;
byte cuts = 0;

/* The source. */
bool pending = true;
byte push_epoch = 1;
bool pushing = false;

#ifdef NO_LOCK
#define LOCK   skip
#define UNLOCK skip
#else
#define LOCK   atomic { !locked -> locked = true }
#define UNLOCK locked = false
#endif

#define WAKE waiting[0] = false; waiting[1] = false

/* ---- destination ---- */

/* A vCPU, which reads up to so many times. What it reads, and whether the page was given up by then, is one moment. */
proctype guest(bit me; byte most)
{
    byte reads = 0;

    do
    :: reads < most ->
        if
        :: atomic { page != MISSING ->
            assert(page == (removed -> ZEROS : BYTES));
            reads++ }
        :: atomic { page == MISSING -> waiting[me] = true; faults++ };
            !waiting[me]
        fi
    :: break
    od
}

/* The VMM gives the page up, once, at any moment or never (discard_private in pages/discard.c). */
proctype vmm()
{
    if
    :: LOCK;
        atomic { page = MISSING; removed = true };
        if
        :: table == remote -> table = absent; requested = false
        :: table != remote -> table = absent
        fi;
#ifndef NO_WAKE
        atomic { WAKE };
#endif
        UNLOCK
    :: skip
    fi
}

/* Bytes came, on either connection (place_in_block in incoming.c). */
inline place()
{
    LOCK;
    if
#ifdef NO_LOOK
    :: true ->
#else
    :: table == remote ->
#endif
        atomic { assert(page == MISSING); page = BYTES; WAKE };
        table = private;
        requested = false
#ifndef NO_LOOK
    :: table != remote
#endif
    fi;
    UNLOCK
}

/* The handler's thread: faults, answers, and a new connection, on which it says what it has and asks
 * again for what it had asked for. */
proctype handler()
{
    byte mine = 1;

end:
    do
    :: atomic { faults > 0 -> faults-- };
        LOCK;
        if
        :: table == remote && !requested ->
            requested = true;
            atomic {
                if
                :: mine == epoch -> to_source!WANT
                :: mine != epoch /* a connection that is over, and not known to be */
                fi
            }
        :: table == remote && requested
        :: table == absent ->
            atomic {
                if
                :: page == MISSING -> page = ZEROS
                :: else
                fi;
                WAKE
            }
        :: table == private -> atomic { WAKE }
        fi;
        UNLOCK
    :: atomic { mine == epoch && nempty(urgent) -> urgent?_ };
        place()
    :: atomic { mine != epoch -> mine = epoch };
#ifndef NO_HAVE
        LOCK;
        atomic {
            if
            :: mine == epoch && table == remote -> to_source!HAVE_NOT
            :: mine == epoch && table != remote -> to_source!HAVE
            :: mine != epoch
            fi
        };
        UNLOCK;
#endif
        LOCK;
        atomic {
            if
            :: mine == epoch && table == remote && requested -> to_source!WANT
            :: !(mine == epoch && table == remote && requested)
            fi
        };
        UNLOCK
    od
}

proctype placer()
{
end:
    do
    :: atomic { nempty(bulk) -> bulk?_ }; /* read before a cut, placed when it comes to it */
        place()
    od
}

/* Waits until it can say DONE. */
proctype proof()
{
    table != remote
}

/* ---- source ---- */

/* Answers requests; takes up the push again when it has heard what is there. */
proctype answerer()
{
    byte mine = 1;
    bool have;

end:
    do
    :: atomic { mine != epoch -> mine = epoch }
    :: atomic { mine == epoch && to_source?[WANT] -> to_source?WANT };
        pending = false;
        atomic {
            if
            :: mine == epoch -> urgent!1
            :: mine != epoch
            fi
        }
    :: atomic {
            if
            :: mine == epoch && to_source?[HAVE] -> to_source?HAVE; have = true
            :: mine == epoch && to_source?[HAVE_NOT] -> to_source?HAVE_NOT; have = false
            fi
        };
#ifndef NO_HOLD
        push_epoch = 0;
        !pushing || mine != epoch;
#endif
        pending = !have;
        push_epoch = mine
    od
}

proctype pusher()
{
    byte mine = 1;
    bool took;

end:
    do
    :: atomic { mine != epoch -> mine = epoch }
    :: mine == epoch && pending ->
        pushing = true;
        took = false;
        if
        :: push_epoch == mine -> atomic { took = pending; pending = false }
        :: else
        fi;
        atomic {
            if
            :: took && mine == epoch -> bulk!1
            :: !took || mine != epoch
            fi
        };
        pushing = false
    od
}

/* ---- the link ---- */

proctype cutter()
{
    do
    :: cuts < CUTS ->
        atomic {
            do
            :: nempty(to_source) -> to_source?_
            :: nempty(urgent) -> urgent?_
            :: nempty(bulk) -> bulk?_
            :: empty(to_source) && empty(urgent) && empty(bulk) -> break
            od;
            epoch++;
            cuts++
        }
    :: break
    od
}

init
{
    atomic {
        run guest(0, READS);
        run guest(1, 1);
        run vmm();
        run handler();
        run placer();
        run answerer();
        run pusher();
        run proof();
        run cutter()
    }
}
