using System;
using System.Runtime.InteropServices;

namespace Safelight
{
    /// <summary>
    /// What the library gave and is to be given back, exactly once. The runtime holds it while a call uses it, so a
    /// handle that another thread disposes of is freed when the last call has returned.
    /// </summary>
    internal abstract class NativeHandle : SafeHandle
    {
        protected NativeHandle() : base(IntPtr.Zero, ownsHandle: true) { }

        public override bool IsInvalid => handle == IntPtr.Zero;

        /// <summary>Reads what belongs to this handle, which stays alive meanwhile.</summary>
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
