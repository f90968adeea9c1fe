using System;
using System.Runtime.InteropServices;

namespace Safelight
{
    /// <summary>
    /// A handle of the library, which is freed exactly once. The runtime keeps it while a call uses it, so a handle that
    /// another thread disposes of is freed after the last call has returned.
    /// </summary>
    internal abstract class NativeHandle : SafeHandle
    {
        protected NativeHandle() : base(IntPtr.Zero, ownsHandle: true) { }

        public override bool IsInvalid => handle == IntPtr.Zero;

        /// <summary>Reads something that belongs to this handle, and keeps the handle alive meanwhile.</summary>
        internal T While<T>(Func<IntPtr, T> read)
        {
            bool isHeld = false;
            try
            {
                DangerousAddRef(ref isHeld);
                return read(handle);
            }
            finally
            {
                if (isHeld) DangerousRelease();
            }
        }

        protected sealed override bool ReleaseHandle()
        {
            Free(handle);
            return true;
        }

        protected abstract void Free(IntPtr owned);
    }

    internal sealed class ErrorHandle : NativeHandle
    {
        protected override void Free(IntPtr owned) => Native.safelight_error_free(owned);
    }

    internal sealed class TextHandle : NativeHandle
    {
        protected override void Free(IntPtr owned) => Native.safelight_text_free(owned);
    }

    internal sealed class OptionsHandle : NativeHandle
    {
        protected override void Free(IntPtr owned) => Native.safelight_options_free(owned);
    }

    internal sealed class ClientHandle : NativeHandle
    {
        protected override void Free(IntPtr owned) => Native.safelight_client_free(owned);
    }

    internal sealed class RequestHandle : NativeHandle
    {
        protected override void Free(IntPtr owned) => Native.safelight_request_free(owned);
    }

    internal sealed class GenerationHandle : NativeHandle
    {
        protected override void Free(IntPtr owned) => Native.safelight_generation_free(owned);
    }

    internal sealed class EventHandle : NativeHandle
    {
        protected override void Free(IntPtr owned) => Native.safelight_event_free(owned);
    }
}
