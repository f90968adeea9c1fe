using System;
using System.Collections;
using System.Collections.Generic;
using System.Runtime.InteropServices;
using System.Threading;
using System.Threading.Tasks;

namespace Safelight
{
    /// <summary>The state of a generation.</summary>
    public enum State
    {
        /// <summary>The server has not answered yet.</summary>
        Asked = 0,
        /// <summary>It was admitted: it is queued or being computed.</summary>
        Accepted = 1,
        /// <summary>All pictures have been received.</summary>
        Succeeded = 2,
        /// <summary><see cref="Generation.Error"/> says why.</summary>
        Failed = 3,
        /// <summary>It was closed before its end.</summary>
        Closed = 4
    }

    /// <summary>The result of a poll.</summary>
    public enum PollResult
    {
        /// <summary>The newest image was copied before, or there is no image yet.</summary>
        NothingNew = 0,
        Copied = 1,
        /// <summary>The buffer or the pitch is too small for the image, which can still be copied.</summary>
        TooSmall = -1,
        /// <summary>The image is not raw RGBA8.</summary>
        NotRaw = -2
    }

    /// <summary>
    /// A generation: its events in order, or its newest image at any time. A thread of the library receives it. Several
    /// threads may use it.
    /// </summary>
    public sealed class Generation : IEnumerable<Event>, IDisposable
    {
        private readonly GenerationHandle handle;

        internal Generation(GenerationHandle handle) { this.handle = handle; }

        public State State => Native.safelight_generation_state(handle);

        /// <summary>"generations/ID"; "" before it was accepted.</summary>
        public string Name => handle.While(_ => Native.Text(Native.safelight_generation_name(handle)));

        /// <summary>Why it failed; null while it has not.</summary>
        public SafelightException Error => handle.While(_ =>
        {
            IntPtr error = Native.safelight_generation_error(handle);
            return error == IntPtr.Zero ? null : SafelightException.Read(error);
        });

        /// <summary>
        /// All events until the end. Each is given once, to one reader. Blocks for each. If progress and previews are not
        /// taken in time, only the newest of each output is kept. Leaving the loop before the end closes the generation.
        /// </summary>
        /// <exception cref="SafelightException">The generation failed.</exception>
        public IEnumerator<Event> GetEnumerator()
        {
            bool hasEnded = false;
            try
            {
                while (Next() is Event next) yield return next;
                hasEnded = true;
            }
            finally
            {
                if (!hasEnded) Close();
            }
            if (Error is SafelightException error) throw error;
        }

        IEnumerator IEnumerable.GetEnumerator() => GetEnumerator();

        /// <summary>The next event; null if none comes in time, and after the end.</summary>
        /// <param name="timeout">Zero: does not wait; null: waits without a limit.</param>
        public Event Next(TimeSpan? timeout = null)
        {
            while (true)
            {
                using (EventHandle next = Native.safelight_generation_next(handle, timeout?.TotalSeconds ?? -1))
                {
                    if (next.IsInvalid) return null;
                    if (Event.Read(next, this) is Event known) return known;
                }
            }
        }

        /// <summary>Blocks until the generation has ended, and returns its state.</summary>
        /// <param name="timeout">null: waits without a limit.</param>
        public State Wait(TimeSpan? timeout = null) => Native.safelight_generation_wait(handle, timeout?.TotalSeconds ?? -1);

        /// <summary>Waits for all pictures and returns that of an output.</summary>
        /// <param name="cancellation">Closes the generation; the task is cancelled.</param>
        /// <exception cref="SafelightException">The generation failed.</exception>
        public async Task<Picture> PictureAsync(
            int outputIndex = 0, CancellationToken cancellation = default(CancellationToken))
        {
            using (cancellation.Register(Close))
            {
                // A thread of its own, since a picture takes seconds and the pool has few threads.
                State state = await Task.Factory.StartNew(
                    () => Wait(), CancellationToken.None, TaskCreationOptions.LongRunning, TaskScheduler.Default)
                    .ConfigureAwait(false);
                if (state == State.Closed)
                {
                    cancellation.ThrowIfCancellationRequested();
                    throw new OperationCanceledException("the generation was closed");
                }
            }
            if (Error is SafelightException error) throw error;
            return Picture(outputIndex) ?? throw new ArgumentOutOfRangeException(nameof(outputIndex));
        }

        /// <summary>The finished picture of an output; null before.</summary>
        public Picture Picture(int outputIndex = 0) => handle.While(_ =>
        {
            IntPtr image = Native.safelight_generation_picture(handle, outputIndex);
            return image == IntPtr.Zero ? null : new Picture(image, outputIndex);
        });

        /// <summary>The size of its pictures. Returns false before it was accepted.</summary>
        public bool TryGetSize(out int widthPx, out int heightPx) =>
            Native.safelight_generation_size(handle, out widthPx, out heightPx) != 0;

        /// <summary>Returns how many steps an output has made.</summary>
        public int Step(int outputIndex, out int numSteps) =>
            Native.safelight_generation_step(handle, outputIndex, out numSteps);

        /// <summary>
        /// Copies the newest image of an output into the caller's buffer: a preview, or at the end the picture. It never
        /// waits and allocates nothing, so it can be called in a game loop.
        /// </summary>
        /// <param name="pixels">RGBA8, sRGB, straight alpha.</param>
        /// <param name="rowPitch">Bytes from one row to the next; 0: four times the width.</param>
        /// <param name="flip">Whether the lowest row comes first, as in Unity's textures.</param>
        /// <param name="step">The step of the preview; 0 for the picture.</param>
        public PollResult PollRgba8(
            int outputIndex, byte[] pixels, int rowPitch, bool flip, out int widthPx, out int heightPx, out int step)
        {
            if (pixels == null) throw new ArgumentNullException(nameof(pixels));
            GCHandle pinned = GCHandle.Alloc(pixels, GCHandleType.Pinned);
            try
            {
                return PollRgba8(outputIndex, pinned.AddrOfPinnedObject(), pixels.Length, rowPitch, flip,
                    out widthPx, out heightPx, out step);
            }
            finally
            {
                pinned.Free();
            }
        }

        /// <summary>Copies into memory that the runtime does not own, such as a NativeArray of Unity.</summary>
        public PollResult PollRgba8(
            int outputIndex, IntPtr pixels, int numBytes, int rowPitch, bool flip,
            out int widthPx, out int heightPx, out int step)
        {
            return Native.safelight_generation_poll_rgba8(
                handle, outputIndex, pixels, Size(numBytes, nameof(numBytes)), Size(rowPitch, nameof(rowPitch)),
                flip ? 1 : 0, out widthPx, out heightPx, out step);
        }

        /// <summary>As PollRgba8, scaled to the given size, since previews may be smaller than the picture.</summary>
        public PollResult PollScaledRgba8(
            int outputIndex, byte[] pixels, int rowPitch, bool flip, int widthPx, int heightPx, out int step)
        {
            if (pixels == null) throw new ArgumentNullException(nameof(pixels));
            GCHandle pinned = GCHandle.Alloc(pixels, GCHandleType.Pinned);
            try
            {
                return PollScaledRgba8(outputIndex, pinned.AddrOfPinnedObject(), pixels.Length, rowPitch, flip,
                    widthPx, heightPx, out step);
            }
            finally
            {
                pinned.Free();
            }
        }

        /// <summary>As PollScaledRgba8, into memory that the runtime does not own.</summary>
        public PollResult PollScaledRgba8(
            int outputIndex, IntPtr pixels, int numBytes, int rowPitch, bool flip, int widthPx, int heightPx, out int step)
        {
            return Native.safelight_generation_poll_scaled_rgba8(
                handle, outputIndex, pixels, Size(numBytes, nameof(numBytes)), Size(rowPitch, nameof(rowPitch)),
                flip ? 1 : 0, widthPx, heightPx, out step);
        }

        /// <summary>Asks the server to stop it, and returns its final state with the step that each output reached.</summary>
        /// <exception cref="SafelightException">Also if it was not accepted yet; <see cref="Close"/> is then enough.</exception>
        public GenerationInfo Cancel() =>
            new GenerationInfo(Client.Take(Native.safelight_generation_cancel(handle, out ErrorHandle error), error));

        /// <summary>
        /// Stops watching: the server suspends the generation, and cancels it after its grace period. Does not wait. Threads
        /// that read events or wait are woken.
        /// </summary>
        public void Close() => Native.safelight_generation_close(handle);

        /// <summary>Closes the generation, and frees everything that belongs to it.</summary>
        public void Dispose()
        {
            if (handle.IsClosed) return;
            Close();  // so that a thread in Next() or Wait(), which holds the handle, returns
            handle.Dispose();
        }

        private static UIntPtr Size(int numBytes, string name)
        {
            if (numBytes < 0) throw new ArgumentOutOfRangeException(name);
            return (UIntPtr)(uint)numBytes;
        }
    }
}
